"""One step's images, ready to be learned from. N images of a step, T tokens of an image."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from argrpo.engine.rollout import Rollout
from argrpo.loss_batch import LossBatch, LossScale
from argrpo.ranks import count_over_ranks
from argrpo.token_scores import TokensToScore


class FixedLogprobs(NamedTuple):
    """Log-probs of a rollout that stay fixed while the policy moves; no score is in them."""

    tokens: TokensToScore
    old: Tensor | None  # [N, T] fp32 that ratios compare with; None: each pass is its own
    reference: Tensor | None  # [N, T] fp32; None without a KL


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class Experience:
    """A rollout, what its images are worth, and log-probs that stay while the policy moves."""

    rollout: Rollout
    tokens: TokensToScore
    advantages: Tensor  # [N] fp32, or [N, C] with one column a component
    used: Tensor  # [N] bool, the images that learn
    all_used: bool
    old_logprobs: Tensor | None  # [N, T] fp32; None: those of the forward pass itself
    ref_logprobs: Tensor | None  # [N, T] fp32
    draw_logprobs: Tensor | None  # [N, T] fp32, where the objective compares with the draw

    def __len__(self) -> int:
        return len(self.used)

    def scale(self, rows: Tensor, *, summed: int) -> LossScale:
        """The size of an optimizer step on some images, and on as many of each other rank.

        Without a score, or another to compare it with, an image does not even feel the KL.
        """
        # A host sync an optimizer step, and none where every image was scored.
        own_used = len(rows) if self.all_used else int(self.used[rows].sum())
        num_used = count_over_ranks(own_used)
        num_tokens = self.rollout.token_ids.shape[1]
        return LossScale(max(num_used, 1), num_used * num_tokens, num_tokens, summed)

    def batch(
        self, rows: Tensor, scale: LossScale, entropy_coef: Tensor | float | None
    ) -> LossBatch:
        """The constants of the loss of some images; `entropy_coef` as a tensor is [N]."""
        return LossBatch(
            self.advantages[rows],
            scale,
            mask=self._mask(rows),
            old_logprobs=_rows(self.old_logprobs, rows),
            ref_logprobs=_rows(self.ref_logprobs, rows),
            draw_logprobs=_rows(self.draw_logprobs, rows),
            entropy_coef=entropy_coef[rows] if isinstance(entropy_coef, Tensor) else entropy_coef,
        )

    def _mask(self, rows: Tensor) -> Tensor | None:
        if self.all_used:
            return None
        return self.used[rows, None].expand(-1, self.rollout.token_ids.shape[1])


def _rows(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]
