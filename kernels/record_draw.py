"""What a decode step does with the tokens it drew, in one launch.

    log[row, position] = token, log-prob, entropy, conditional log-prob, kept set
    x[branch, row]     = embedding of the token, plus a learned one of its place where there is
                         such a table: both branches of guidance are fed the same
    positions[row]    += 1,  entries[branch, row] = where the next keys go, -1 after the last

All state stands on the device and moves there, so that a captured step can be replayed without the
host. A row whose position is past its image is idle: it logs nothing and stays idle.

One program a row. 128 guided rows of XL in bf16 read 0.33 MB of embeddings and write 0.66 MB, with
kept sets 0.26 MB more each way: 0.3 us at 4.3 TB/s and no arithmetic, so it costs its launch. As
eager PyTorch it is 9 to 11 launches of about 1.3 us inside a graph.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from argrpo.kernels._checks import FLOATS, expect, uses_triton
from argrpo.kernels.draw import Draw

_WARPS = 4
_IDLE_ENTRY = -1


class FedEmbeddings(NamedTuple):
    """What a drawn token becomes when it is fed."""

    tokens: Tensor  # [V, D], contiguous
    places: Tensor | None = None  # [T - 1 or more, D], as `tokens`: row p is added at position p


class DrawLog(NamedTuple):
    """What was drawn of S images, filled position by position; rows may lie apart."""

    token_ids: Tensor  # [S, T] int64
    logprobs: Tensor  # [S, T] fp32
    entropies: Tensor  # [S, T] fp32
    cond_logprobs: Tensor | None  # [S, T] fp32
    support: Tensor | None  # [S, T, ceil(V / 8)] uint8

    def rows(self, rows: slice) -> "DrawLog":
        """A view of some images."""
        cond_logprobs = None if self.cond_logprobs is None else self.cond_logprobs[rows]
        support = None if self.support is None else self.support[rows]
        drawn = self.token_ids[rows], self.logprobs[rows], self.entropies[rows]
        return DrawLog(*drawn, cond_logprobs, support)

    def clone(self) -> "DrawLog":
        """A copy that the next draws leave alone."""
        cond_logprobs = None if self.cond_logprobs is None else self.cond_logprobs.clone()
        support = None if self.support is None else self.support.clone()
        drawn = self.token_ids.clone(), self.logprobs.clone(), self.entropies.clone()
        return DrawLog(*drawn, cond_logprobs, support)


class StepInputs(NamedTuple):
    """What the next decode step reads; K branches of guidance, S rows each."""

    x: Tensor  # [K, S, D] embeddings of the tokens to feed
    positions: Tensor  # [S] int64, the token to draw next; T and more: idle
    entries: Tensor  # [K, S] int64, cache entry of the token to feed; -1: idle

    def rows(self, rows: slice) -> "StepInputs":
        """A view of some slots, in both branches."""
        return StepInputs(self.x[:, rows], self.positions[rows], self.entries[:, rows])


def record_draw_(
    draw: Draw, embeddings: FedEmbeddings, inputs: StepInputs, log: DrawLog, first_entry: int = 0
) -> None:
    """Log a draw and make the inputs of the next step, in place.

    Args:
        draw: one token for each of S rows.
        embeddings: of the tokens, and of their places where the model learned some. The sum is made
            in fp32 and rounded once. A token that is not fed any more gets the last place.
        inputs: where the rows stand; moved on by one token. x in the dtype of the embeddings.
        log: receives the draw at `inputs.positions`; T is its width. Its optional parts are given
            exactly where those of `draw` are.
        first_entry: cache entry of image token 0: the length of a prefix that is kept as keys.

    Raises:
        ValueError: a shape, dtype or layout is not as above.
    """
    _check(draw, embeddings, inputs, log)
    if not uses_triton(embeddings.tokens):
        record_draw_reference_(draw, embeddings, inputs, log, first_entry)
        return
    width = embeddings.tokens.shape[1]
    support = draw.token_ids if draw.support is None else draw.support
    log_support = log.token_ids if log.support is None else log.support
    _record_draw[(len(draw.token_ids),)](
        draw.token_ids,
        draw.logprobs,
        draw.entropies,
        draw.cond_logprobs,
        support,
        *embeddings,
        *inputs,
        log.token_ids,
        log.logprobs,
        log.entropies,
        log.cond_logprobs,
        log_support,
        first_entry,
        log.token_ids.shape[1],
        0 if embeddings.places is None else len(embeddings.places),
        inputs.x.stride(0),
        inputs.entries.stride(0),
        log.token_ids.stride(0),
        log_support.stride(0),
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        BRANCHES=len(inputs.x),
        SUPPORT_BYTES=0 if draw.support is None else support.shape[1],
        SUPPORT_BLOCK=1 if draw.support is None else triton.next_power_of_2(support.shape[1]),
        num_warps=_WARPS,
    )


def record_draw_reference_(
    draw: Draw, embeddings: FedEmbeddings, inputs: StepInputs, log: DrawLog, first_entry: int = 0
) -> None:
    """The specification, in plain PyTorch."""
    num_tokens = log.token_ids.shape[1]
    at = inputs.positions.clamp(max=num_tokens - 1)[:, None]
    busy = (inputs.positions < num_tokens)[:, None]
    for kept, new in zip(log, draw, strict=True):
        if kept is None or new is None:
            continue
        index = at if new.dim() == 1 else at[..., None].expand(-1, 1, new.shape[1])
        value = new[:, None]
        mask = busy if new.dim() == 1 else busy[..., None]
        kept.scatter_(1, index, torch.where(mask, value, kept.gather(1, index)))
    x, places = embeddings.tokens[draw.token_ids], embeddings.places
    if places is not None:
        x = x + places[inputs.positions.clamp(max=len(places) - 1)]
    inputs.x.copy_(x)
    following = inputs.positions + 1
    entries = torch.where(following < num_tokens, inputs.positions + first_entry, _IDLE_ENTRY)
    inputs.entries.copy_(entries)
    inputs.positions.copy_(following)


def _check(draw: Draw, embeddings: FedEmbeddings, inputs: StepInputs, log: DrawLog) -> None:
    tokens, places = embeddings
    expect("embeddings.tokens", tokens, (None, None), FLOATS)
    num_rows, width = len(draw.token_ids), tokens.shape[1]
    integers = (torch.int64,)
    expect("draw.token_ids", draw.token_ids, (num_rows,), integers)
    expect("inputs.positions", inputs.positions, (num_rows,), integers)
    branches = len(inputs.x)
    expect("inputs.x", inputs.x, (branches, num_rows, width), (tokens.dtype,), contiguous=False)
    expect("inputs.entries", inputs.entries, (branches, num_rows), integers, contiguous=False)
    if inputs.x.stride()[1:] != (width, 1) or inputs.entries.stride(1) != 1:
        raise ValueError("inputs: expected the rows of a branch without gaps between them")
    expect("log.token_ids", log.token_ids, (num_rows, None), integers)
    shape = tuple(log.token_ids.shape)
    if places is not None:
        expect("embeddings.places", places, (None, width), (tokens.dtype,))
        if len(places) < max(shape[1] - 1, 1):
            raise ValueError(
                f"embeddings.places: expected at least {max(shape[1] - 1, 1)} rows, one a token "
                f"that is fed, got {len(places)}"
            )
    wanted = {
        "logprobs": (shape, torch.float32),
        "entropies": (shape, torch.float32),
        "cond_logprobs": (shape, torch.float32),
        "support": ((*shape, None), torch.uint8),
    }
    for name, (size, dtype) in wanted.items():
        drawn, kept = getattr(draw, name), getattr(log, name)
        if (drawn is None) != (kept is None):
            raise ValueError(f"log.{name}: expected it exactly where draw.{name} is, got one alone")
        if kept is not None:
            expect(f"log.{name}", kept, size, (dtype,))
            expect(f"draw.{name}", drawn, (num_rows, *kept.shape[2:]), (dtype,))


# Slots of a cohort may start anywhere: without this another start would compile another kernel, in
# the middle of a draw.
@triton.jit(do_not_specialize_on_alignment=[
    "positions_ptr", "entries_ptr", "log_token_ids_ptr", "log_logprobs_ptr", "log_entropies_ptr",
    "log_cond_logprobs_ptr",
])  # fmt: skip
def _record_draw(
    token_ids_ptr, logprobs_ptr, entropies_ptr, cond_logprobs_ptr, support_ptr, embeddings_ptr,
    places_ptr, x_ptr, positions_ptr, entries_ptr,
    log_token_ids_ptr, log_logprobs_ptr, log_entropies_ptr, log_cond_logprobs_ptr, log_support_ptr,
    first_entry, num_tokens, num_places, x_branch_stride, entry_branch_stride, log_row_stride,
    support_row_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BRANCHES: tl.constexpr,
    SUPPORT_BYTES: tl.constexpr, SUPPORT_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row)
    token = tl.load(token_ids_ptr + row)
    busy = position < num_tokens
    at = row * log_row_stride + position
    tl.store(log_token_ids_ptr + at, token, mask=busy)
    tl.store(log_logprobs_ptr + at, tl.load(logprobs_ptr + row), mask=busy)
    tl.store(log_entropies_ptr + at, tl.load(entropies_ptr + row), mask=busy)
    if cond_logprobs_ptr is not None:
        tl.store(log_cond_logprobs_ptr + at, tl.load(cond_logprobs_ptr + row), mask=busy)
    if SUPPORT_BYTES > 0:
        bytes_ = tl.arange(0, SUPPORT_BLOCK)
        inside = bytes_ < SUPPORT_BYTES
        kept = tl.load(support_ptr + row * SUPPORT_BYTES + bytes_, mask=inside, other=0)
        at = row * support_row_stride + position * SUPPORT_BYTES
        wanted = bytes_ < tl.where(busy, SUPPORT_BYTES, 0)
        tl.store(log_support_ptr + at + bytes_, kept, mask=wanted)

    dims = tl.arange(0, BLOCK)
    fits = dims < WIDTH
    embedding = tl.load(embeddings_ptr + token * WIDTH + dims, mask=fits, other=0.0)
    if places_ptr is not None:
        place_at = tl.minimum(position, num_places - 1) * WIDTH + dims
        place = tl.load(places_ptr + place_at, mask=fits, other=0.0)
        total = embedding.to(tl.float32) + place.to(tl.float32)
        embedding = total.to(embedding.dtype)
    entry = tl.where(position + 1 < num_tokens, position + first_entry, -1)
    for branch in tl.static_range(BRANCHES):
        x_at = x_ptr + branch * x_branch_stride.to(tl.int64) + row * WIDTH
        tl.store(x_at + dims, embedding, mask=fits)
        tl.store(entries_ptr + branch * entry_branch_stride + row, entry)
    # Every warp of the program must have read the old position before one of them moves it on.
    tl.debug_barrier()
    tl.store(positions_ptr + row, position + 1)
