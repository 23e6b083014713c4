"""The records of a draw: what its randomness hangs on, what shapes it, what it gives."""

from typing import NamedTuple

from torch import Tensor


class DrawKeys(NamedTuple):
    """What a draw's randomness is a function of, beside the token id."""

    seed: Tensor  # [1] int64, one for the whole draw
    image_ids: Tensor  # [B] int64
    positions: Tensor  # [B] int64, index of the token being drawn, 0 to T - 1


class DrawSettings(NamedTuple):
    """How a draw shapes its distribution. Scalars live on the device so that graphs can replay."""

    scalars: Tensor  # [4] fp32: guidance scale, temperature, top_k (0 = off), top_p (1 = off)
    filtered: bool  # static: whether top_k or top_p may cut anything


class Draw(NamedTuple):
    """One token for each of B rows, and how likely it was."""

    token_ids: Tensor  # [B] int64
    logprobs: Tensor  # [B] fp32, of the distribution drawn from; 0 when greedy
    entropies: Tensor  # [B] fp32, nats, of the distribution drawn from; 0 when greedy
    cond_logprobs: Tensor | None  # [B] fp32, conditional branch alone, no filter; 0 when greedy
    support: Tensor | None  # [B, ceil(V / 8)] uint8, bit 7 - v % 8 of byte v // 8 is token v

    def rows(self, rows: slice) -> "Draw":
        """A view of some rows."""
        cond_logprobs = None if self.cond_logprobs is None else self.cond_logprobs[rows]
        support = None if self.support is None else self.support[rows]
        drawn = self.token_ids[rows], self.logprobs[rows], self.entropies[rows]
        return Draw(*drawn, cond_logprobs, support)
