"""Mean and covariance of features: of a set of images, and as moving averages over batches.

Shapes: C features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class Moments:
    """What a Frechet distance needs to know of a set of images."""

    mean: Tensor  # [C] fp64
    std: Tensor  # [C] fp64, of each feature alone
    cov: Tensor | None  # [C, C] fp64, unbiased; None where only `std` is known
    features: str | None = None  # what made the features, FeatureExtractor.name; None: not known
    num_images: int | None = None

    @property
    def dim(self) -> int:
        return len(self.mean)

    def to(self, device: torch.device) -> "Moments":
        cov = None if self.cov is None else self.cov.to(device)
        return Moments(
            self.mean.to(device), self.std.to(device), cov, self.features, self.num_images
        )


class MomentSums:
    """Adds features up, a part at a time, and says their moments."""

    def __init__(self, dim: int) -> None:
        self._count = 0
        # Sums about the first image: raw squares of features far from 0 would cancel.
        self._origin: Tensor | None = None
        self._first = torch.zeros(dim, dtype=torch.float64)
        self._second = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Count [N, C] features in.

        Raises:
            ValueError: one is not finite, or there are not C of them.
        """
        if features.ndim != 2 or features.shape[1] != len(self._first):
            raise ValueError(
                f"features: expected [N, {len(self._first)}], got {list(features.shape)}"
            )
        if not features.isfinite().all():
            raise ValueError("features: expected finite numbers, got NaN or infinity")
        if len(features) == 0:
            return
        wide = features.double().cpu()
        if self._origin is None:
            self._origin = wide[0].clone()
        wide = wide - self._origin
        self._count += len(wide)
        self._first += wide.sum(dim=0)
        self._second += wide.T @ wide

    def moments(self, features: str | None = None) -> Moments:
        """Of all that was added.

        Args:
            features: name of what made the features.

        Raises:
            ValueError: fewer than two images.
        """
        if self._count < 2 or self._origin is None:
            raise ValueError(f"images: expected at least 2 for moments, got {self._count}")
        mean = self._first / self._count
        cov = (self._second - self._count * torch.outer(mean, mean)) / (self._count - 1)
        std = cov.diagonal().clamp_min(0.0).sqrt()
        return Moments(mean + self._origin, std, cov, features, self._count)


def moments_of(features: Tensor, name: str | None = None) -> Moments:
    """Moments of [N, C] features, N at least 2.

    Raises:
        ValueError: too few, or one is not finite.
    """
    sums = MomentSums(features.shape[1])
    sums.add(features)
    return sums.moments(name)


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class RawMoments:
    """Moving averages of f and of its squares, which mix linearly."""

    first: Tensor  # [C] fp64
    second: Tensor  # [C] squares, or [C, C] products; fp64
    weight: float  # what the averaged terms' weights add up to; 0 before the first, then up to 1

    def to(self, device: torch.device) -> "RawMoments":
        return RawMoments(self.first.to(device), self.second.to(device), self.weight)

    @classmethod
    def empty(cls, dim: int, *, full: bool) -> "RawMoments":
        """Before the first batch."""
        first = torch.zeros(dim, dtype=torch.float64)
        second = torch.zeros((dim, dim) if full else dim, dtype=torch.float64)
        return cls(first, second, 0.0)

    @classmethod
    def of(cls, moments: Moments, *, full: bool, weight: float = 1.0) -> "RawMoments":
        """As if these moments were all that was ever seen.

        Raises:
            ValueError: `full`, and the moments hold no covariances between features.
        """
        if not full:
            second = moments.std.square() + moments.mean.square()
        elif moments.cov is None:
            raise ValueError(
                "cov: expected a full covariance, got the variance of each feature alone; "
                "make the file again with argrpo moments, or take form: diagonal"
            )
        else:
            second = moments.cov + torch.outer(moments.mean, moments.mean)
        return cls(weight * moments.mean, weight * second, weight)

    def updated(self, features: Tensor, decay: float) -> "RawMoments":
        """decay * these + (1 - decay) * those of a batch [N, C]."""
        wide = features.double()
        is_full = self.second.ndim == 2
        second = wide.T @ wide / len(wide) if is_full else wide.square().mean(dim=0)
        return RawMoments(
            decay * self.first + (1.0 - decay) * wide.mean(dim=0),
            decay * self.second + (1.0 - decay) * second,
            decay * self.weight + (1.0 - decay),
        )
