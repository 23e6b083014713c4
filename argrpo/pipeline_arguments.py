"""What `ImagePipeline` is called with, checked."""

from collections.abc import Sequence

import torch
from torch import Tensor


def texts_of(prompt: object) -> list[str]:
    """One or more texts; ValueError for anything else."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, Sequence) or not texts:
        raise ValueError(f"prompt: expected a text or a list of texts, got {prompt!r}")
    strange = [text for text in texts if not isinstance(text, str)]
    if strange:
        raise ValueError(f"prompt: expected texts, got {strange[0]!r} among them")
    return list(texts)


def whole_labels(class_labels: object) -> Tensor:
    """[n] int64, n at least 1; ValueError for anything that is no whole number."""
    try:
        labels = torch.as_tensor(class_labels).flatten().cpu()
    except (ValueError, TypeError, RuntimeError):  # of texts, None and objects
        labels = torch.empty(0)
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(
            f"class_labels: expected one or more whole numbers, got {class_labels!r}; "
            "get_label_ids finds those of names"
        )
    return labels.long()
