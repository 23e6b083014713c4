"""The rollout engine: draws image tokens and says with what probability it drew them."""
