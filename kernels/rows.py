"""The records that the row kernels of the head take and give. M rows, V codebook entries."""

from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.kernels._checks import expect
from argrpo.kernels.token_filter import unpack_support


class Rows(NamedTuple):
    """Tokens to be scored, one for each of M rows."""

    token_ids: Tensor  # [M] int64
    temperature: float
    support: Tensor | None  # [M, ceil(V / 8)] uint8; the given token always counts

    def part(self, rows: slice) -> "Rows":
        support = None if self.support is None else self.support[rows]
        return Rows(self.token_ids[rows], self.temperature, support)

    def check(self, num_rows: int, vocab_size: int) -> None:
        """ValueError by name if these rows do not fit [num_rows, vocab_size] logits."""
        expect("token_ids", self.token_ids, (num_rows,), (torch.int64,))
        if self.support is not None:
            expect("support", self.support, (num_rows, (vocab_size + 7) // 8), (torch.uint8,))
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature}")

    def scale_(self, logits: Tensor) -> Tensor:
        """Divide logits [M, V] by the temperature and put -inf outside the support."""
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        if self.support is not None:
            kept = unpack_support(self.support, logits.shape[1])
            logits.masked_fill_(~kept.scatter_(1, self.token_ids[:, None], True), -torch.inf)
        return logits


class RowScores(NamedTuple):
    """What M rows of logits say of their tokens."""

    logprobs: Tensor  # [M] fp32
    entropies: Tensor  # [M] fp32, nats
    normalisers: Tensor  # [M] fp32, log of the sum of exp(logits / temperature)

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> "RowScores":
        return cls(*(torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(3)))

    def check(self, name: str, num_rows: int) -> None:
        """ValueError unless these are scores of so many rows."""
        for field, score in self._asdict().items():
            expect(f"{name}.{field}", score, (num_rows,), (torch.float32,))

    def part(self, rows: slice) -> "RowScores":
        return RowScores(self.logprobs[rows], self.entropies[rows], self.normalisers[rows])


class FixedScales(NamedTuple):
    """d loss / d what is said of M tokens, where no scale depends on the policy's log-probs.

    So it is with one update a rollout: the ratio is 1, d loss / d log-prob is minus the advantage.
    """

    logprobs: Tensor  # [M] fp32, d loss / d log-prob, the KL aside
    kl: Tensor | None = None  # [M] fp32, d loss / d k3; needs ref_logprobs
    ref_logprobs: Tensor | None = None  # [M] fp32, of the reference that the KL is measured to
    entropies: Tensor | None = None  # [M] fp32, d loss / d entropy

    def part(self, rows: slice) -> "FixedScales":
        optional = (None if scale is None else scale[rows] for scale in self[1:])
        return FixedScales(self.logprobs[rows], *optional)

    def of_logprobs(self, logprobs: Tensor) -> Tensor:
        """d loss / d log-prob, the KL included."""
        if self.kl is None or self.ref_logprobs is None:
            return self.logprobs
        return self.logprobs - self.kl * torch.expm1(self.ref_logprobs - logprobs)

    def check(self, num_rows: int) -> None:
        """ValueError by name if these scales do not fit M rows."""
        for name, scale in zip(self._fields, self, strict=True):
            if scale is not None:
                expect(f"scales.{name}", scale, (num_rows,), (torch.float32,), contiguous=False)
        if (self.kl is None) != (self.ref_logprobs is None):
            raise ValueError(
                "scales.kl: expected ref_logprobs beside it, got one without the other"
            )
