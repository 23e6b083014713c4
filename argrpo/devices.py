"""Where tensors live and in what precision, by the names that settings use."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """auto takes a GPU where there is one; of several, the one that this process was given."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA GPU, got none; use --device cpu")
    # By its number: "cuda" alone would be the first GPU in every thread but the main one.
    return torch.device(name, torch.cuda.current_device())
