"""What a loss depends on besides the policy.

Shapes: N images, T tokens of an image, C components of the reward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from argrpo.kernels._checks import expect

_FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class LossScale:
    """The size of a whole optimizer step, over all its micro-batches and ranks."""

    num_rows: int
    """Images, those without a counted token included."""

    num_tokens: int
    """Counted tokens of all images."""

    max_tokens: int
    """Tokens that an image may have; dr_grpo divides by it."""

    summed: int = 1
    """Images whose losses are summed where the others are averaged: the group, in LOO-FID."""

    def __post_init__(self) -> None:
        if min(self.num_rows, self.max_tokens, self.summed) < 1 or self.num_tokens < 0:
            raise ValueError(f"scale: expected at least 1 row of at least 1 token, got {self}")


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class LossBatch:
    """What the loss of a micro-batch depends on besides the policy: constants, in its dtype."""

    advantages: Tensor  # [N], or [N, C] with one column a component, its weight included
    scale: LossScale
    mask: Tensor | None = None
    """[N, T] bool, the tokens that count; None counts all. What stands at the others may be
    anything, NaN included."""
    old_logprobs: Tensor | None = None
    """[N, T] before the step's first update. None is strictly on-policy: the policy's very
    log-probs, so the ratio is 1 and only its gradient counts."""
    ref_logprobs: Tensor | None = None
    """[N, T] under the reference; needed where beta is above 0, measured anyway."""
    draw_logprobs: Tensor | None = None
    """[N, T] recorded at the draw; needed with an importance_sampling_cap."""
    entropy_coef: Tensor | float | None = None
    """In place of the config's entropy_coef: one for all images, or [N]."""

    def check(self, logprobs: Tensor, entropies: Tensor | None) -> None:
        """ValueError by name if these constants do not fit the policy's tensors."""
        expect("logprobs", logprobs, (None, None), _FLOATS, contiguous=False)
        num_rows, num_tokens = logprobs.shape
        components = self.advantages.shape[1:] if self.advantages.dim() == 2 else ()
        shapes: dict[str, tuple[int | None, ...]] = {
            "advantages": (num_rows, *components),
            "entropy_coef": (num_rows,),
        }
        of_tokens = ("old_logprobs", "ref_logprobs", "draw_logprobs")
        named = {name: getattr(self, name) for name in ("advantages", "entropy_coef", *of_tokens)}
        for name, values in {**named, "entropies": entropies}.items():
            if isinstance(values, Tensor):
                shape = shapes.get(name, (num_rows, num_tokens))
                expect(name, values, shape, (logprobs.dtype,), contiguous=False)
        if self.mask is not None:
            expect("mask", self.mask, (num_rows, num_tokens), (torch.bool,), contiguous=False)
