"""Where tensors live and in what precision, by the names that settings use."""

import gc

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """auto takes a GPU where there is one; of several, the one that this process was given.

    Raises:
        ValueError: another name than auto, cpu and cuda, or no GPU for cuda.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA GPU, got none; use --device cpu")
    # By its number: "cuda" alone would be the first GPU in every thread but the main one.
    return torch.device(name, torch.cuda.current_device())


def choose_dtype(name: str) -> torch.dtype:
    """The dtype of a name; ValueError for one that is none of `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"dtype: expected {' or '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def free_memory(device: torch.device) -> None:
    """Give back the memory of models that nothing names any more."""
    # Modules hold each other in cycles, which only a collection ends.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
