"""What a loss was made of, measured so that micro-batches add up to the same numbers as one batch.

Everything is kept as sums, minima and maxima on the device; names and means come at the end.

Shapes: N images, T tokens of an image.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from argrpo.ranks import gather_rows


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class TokenTerms:
    """The terms of a loss, token by token; finite everywhere, also where a mask hides them."""

    ratio: Tensor  # [N, T] new over old probability, capped at delta where that is set
    low: Tensor  # [N, T] share of the components that the lower bound stops: advantage below 0
    high: Tensor  # [N, T] share that the upper bound stops: above 0; reversed clips: the other way
    kl: Tensor | None  # [N, T] nats, k3
    entropies: Tensor | None  # [N, T] nats


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class LossMetrics:
    """Sums over the counted tokens of a micro-batch, or of several merged; all [] fp64."""

    loss: Tensor
    num_tokens: Tensor
    ratio: Tensor
    ratio_max_abs_dev: Tensor  # largest abs(ratio - 1)
    low: Tensor
    low_min: Tensor  # smallest share of an image's tokens that is clipped low
    high: Tensor
    high_max: Tensor  # largest share of an image's tokens that is clipped high
    kl: Tensor | None
    entropy: Tensor | None

    def merged(self, other: Self) -> "LossMetrics":
        """The metrics of both micro-batches together."""
        return LossMetrics(
            loss=self.loss + other.loss,
            num_tokens=self.num_tokens + other.num_tokens,
            ratio=self.ratio + other.ratio,
            ratio_max_abs_dev=torch.maximum(self.ratio_max_abs_dev, other.ratio_max_abs_dev),
            low=self.low + other.low,
            low_min=torch.minimum(self.low_min, other.low_min),
            high=self.high + other.high,
            high_max=torch.maximum(self.high_max, other.high_max),
            kl=_sum(self.kl, other.kl),
            entropy=_sum(self.entropy, other.entropy),
        )

    def over_ranks(self) -> "LossMetrics":
        """The metrics of all ranks together, the same on each of them."""
        names = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        rows, _ = gather_rows(torch.stack([getattr(self, name) for name in names])[None])
        parts = [replace(self, **dict(zip(names, row, strict=True))) for row in rows]
        merged = parts[0]
        for part in parts[1:]:
            merged = merged.merged(part)
        return merged

    def named(self, *, entropy_name: str = "entropy/policy") -> dict[str, float]:
        """Means over tokens under TRL's names; kl and entropy only if they were given.

        low_min and high_max are over images, where TRL's are over processes. At the sequence level
        an image's ratio counts once for each of its tokens.

        Args:
            entropy_name: the entropies' name in the log. The default is right for the conditional
                model at temperature 1.
        """
        optional = [value for value in (self.kl, self.entropy) if value is not None]
        extremes = [self.loss, self.ratio_max_abs_dev, self.low_min, self.high_max]
        means = torch.stack([self.ratio, self.low, self.high, *optional])
        means = means / self.num_tokens.clamp(min=1)
        # The one host sync of a step's loss: the log needs numbers.
        loss, deviation, low_min, high_max, ratio, low, high, *rest = torch.cat(
            [torch.stack(extremes), means]
        ).tolist()
        names = [
            name
            for name, value in (("kl", self.kl), (entropy_name, self.entropy))
            if value is not None
        ]
        return {
            "loss": loss,
            "ratio_mean": ratio,
            "ratio_max_abs_dev": deviation,
            "clip_ratio/low_mean": low,
            # Only where no token counts does a minimum lie above its mean.
            "clip_ratio/low_min": min(low_min, low),
            "clip_ratio/high_mean": high,
            "clip_ratio/high_max": high_max,
            "clip_ratio/region_mean": low + high,
            **dict(zip(names, rest, strict=True)),
        }


@torch.no_grad()
def measure(loss: Tensor, terms: TokenTerms, mask: Tensor | None) -> LossMetrics:
    """Metrics of one micro-batch.

    Args:
        loss: [], its share of the step's loss.
        terms: of its tokens.
        mask: [N, T] bool, the tokens that count; None counts all.
    """
    ratio = terms.ratio.double()
    counted = torch.ones_like(ratio) if mask is None else mask.double()
    row_tokens = counted.sum(dim=1)
    low = (counted * terms.low).sum(dim=1)
    high = (counted * terms.high).sum(dim=1)
    return LossMetrics(
        loss=loss.double(),
        num_tokens=row_tokens.sum(),
        ratio=(counted * ratio).sum(),
        ratio_max_abs_dev=(counted * (ratio - 1).abs()).amax(),
        low=low.sum(),
        # An image without a token has no share; 1 and 0 are what no minimum or maximum minds.
        low_min=(low / row_tokens).nan_to_num(nan=1.0).amin(),
        high=high.sum(),
        high_max=(high / row_tokens).nan_to_num(nan=0.0).amax(),
        kl=None if terms.kl is None else (counted * terms.kl).sum(),
        entropy=None if terms.entropies is None else (counted * terms.entropies).sum(),
    )


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one + other
