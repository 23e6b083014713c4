"""The networks: policies, the image tokenizer, and how they are read from files."""
