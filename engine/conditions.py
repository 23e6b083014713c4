"""What an image is conditioned on: class labels [N] int64, or the features of text prompts."""

from dataclasses import InitVar, dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class TextFeatures:
    """Encoded prompts, one entry a distinct prompt, and which row of a batch uses which."""

    features: Tensor  # [P, L, C] floating point
    mask: Tensor  # [P, L] bool or integer, 1 on valid positions
    index: Tensor | None = None  # [N] int64 into the P prompts; None: row i uses prompt i
    looks_at_values: InitVar[bool] = True  # the host waits for the device to check them

    def __post_init__(self, looks_at_values: bool) -> None:
        if self.features.dim() != 3 or not self.features.is_floating_point():
            raise ValueError(
                "features: expected a floating [P, L, C] tensor, "
                f"got {self.features.dtype} {list(self.features.shape)}"
            )
        if self.mask.shape != self.features.shape[:2]:
            raise ValueError(
                f"mask: expected shape {list(self.features.shape[:2])}, got {list(self.mask.shape)}"
            )
        if self.index is not None and (self.index.dim() != 1 or self.index.dtype != torch.int64):
            raise ValueError(
                f"index: expected an int64 [N] tensor, got {self.index.dtype} "
                f"{list(self.index.shape)}"
            )
        if not looks_at_values:
            return
        if not bool(self.mask.bool().any(dim=1).all()):
            raise ValueError("mask: expected at least one valid position a prompt, got none")
        if self.index is not None and len(self.index):
            low, high = torch.stack(self.index.aminmax()).tolist()
            if low < 0 or high >= len(self.features):
                raise ValueError(
                    f"index: expected 0 to {len(self.features) - 1}, got {low if low < 0 else high}"
                )

    @property
    def rows(self) -> Tensor:
        """[N] int64: the prompt of every row."""
        if self.index is not None:
            return self.index
        return torch.arange(len(self.features), device=self.features.device)


Conditions: TypeAlias = Tensor | TextFeatures


@dataclass(frozen=True, slots=True, eq=False)
class DistinctConditions:
    """Conditions without repetition, and the row that each image uses."""

    conditions: Conditions  # of P distinct entries
    index: Tensor  # [N] int64 into them


def num_images(conditions: Conditions) -> int:
    """How many images the conditions describe."""
    if isinstance(conditions, TextFeatures):
        return len(conditions.rows)
    return len(conditions)


def moved_to(conditions: Conditions, device: torch.device) -> Conditions:
    """The conditions on another device (the same tensors where they are there already)."""
    if isinstance(conditions, TextFeatures):
        index = None if conditions.index is None else conditions.index.to(device)
        return TextFeatures(conditions.features.to(device), conditions.mask.to(device), index)
    return conditions.to(device)


def select(conditions: Conditions, rows: Tensor) -> Conditions:
    """The conditions of some rows; prompts are shared, not copied."""
    if isinstance(conditions, TextFeatures):
        index = conditions.rows[rows]
        return TextFeatures(conditions.features, conditions.mask, index, looks_at_values=False)
    return conditions[rows]


def same_conditions(one: Conditions | None, other: Conditions) -> bool:
    """Whether two sets of conditions are equal, row by row."""
    if isinstance(one, TextFeatures) and isinstance(other, TextFeatures):
        return (
            torch.equal(one.rows, other.rows)
            and torch.equal(one.mask, other.mask)
            and torch.equal(one.features, other.features)
        )
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return False


def distinct(conditions: Conditions) -> DistinctConditions:
    """Each label or prompt once, so that a group of images computes its prefix once."""
    if isinstance(conditions, TextFeatures):
        used, index = torch.unique(conditions.rows, return_inverse=True)
        prompts = TextFeatures(conditions.features[used], conditions.mask[used])
        return DistinctConditions(prompts, index)
    labels, index = torch.unique(conditions, return_inverse=True)
    return DistinctConditions(labels, index)
