"""Cases of the next token's draw: from hidden states, and from logits. B rows, D width, V tokens.

Logits have a standard deviation of 2, as an image model's have: what a filter keeps, and how long
it searches, depends on that.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from kernel_cases import FLOOR, MODELS, OURS, VOCAB_SIZE, Case, Contender, Grid, Place, bound
from kernel_peers import flashinfer_draw
from timing import Call, Work
from torch import Tensor

from argrpo.kernels.draw import Draw, DrawKeys, DrawSettings
from argrpo.kernels.guidance import head_logits, mix_hidden
from argrpo.kernels.guided_sampling import (
    guided_sample,
    guided_sample_reference,
    sample_logits,
    sample_logits_reference,
)
from argrpo.kernels.token_filter import filter_mask, unpack_support

GUIDANCE_SCALE = 2.0
LOGIT_SPREAD = 2.0
BRANCH_DISTANCE = 0.3  # of the unconditional hidden state from the conditional one, relative
SETTINGS = {"none": (0, 1.0), "k and p": (2000, 0.95), "k": (2000, 1.0), "p": (0, 0.95)}
# Two programs that add the same products in another order: 1e-6 in fp32. In half precision a mixed
# hidden state may round the other way, 2^-9 of it, in a few of a thousand values.
_SAME_SCORE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 5e-3}


class Drawn(NamedTuple):
    """What a contender gives of B rows; None is not judged."""

    token_ids: Tensor
    logprobs: Tensor | None
    entropies: Tensor | None
    cond_logprobs: Tensor | None = None
    support: Tensor | None = None


# Logits [B, V] fp32, unfiltered -> a draw
Sampler: TypeAlias = Callable[[Tensor], Drawn]


class SampleInputs(NamedTuple):
    """A step's draw; `hidden` is None where logits are given."""

    hidden: tuple[Tensor, Tensor, Tensor] | None  # cond, uncond [B, D], head weight [V, D]
    logits: Tensor | None  # [B, V] fp32
    keys: DrawKeys
    settings: DrawSettings


class RightDraw(NamedTuple):
    """The draw of the reference, and all that another draw of the same rows is judged by."""

    draw: Draw
    log_probs: Tensor  # [B, V] of the distribution drawn from; -inf outside of it
    cond_log_probs: Tensor | None  # [B, V] of the conditional branch alone, where there is one
    same_score: float


def cases(place: Place, grid: Grid) -> Iterator[Case]:
    for model in grid.models:
        for rows in grid.rows:
            for filters in ("none", "k and p"):
                yield _hidden_case(place, model, rows, filters)
    for rows in grid.rows:
        for filters in ("k", "p"):
            yield _hidden_case(place, grid.models[0], rows, filters)
        for filters in SETTINGS:
            yield _logits_case(place, rows, filters)


def _hidden_case(place: Place, model: str, rows: int, filters: str) -> Case:
    dim = MODELS[model].dim
    num_bytes = (VOCAB_SIZE * dim + 2 * rows * dim) * place.itemsize
    return Case(
        "guided_sample",
        {"model": model, "rows": rows, "filters": filters, "guidance_scale": GUIDANCE_SCALE},
        Work(num_bytes, 2 * rows * dim * VOCAB_SIZE),
        partial(_make, place, rows, dim, filters),
        partial(_expect, place),
        [*_ours(filters), *_peers(filters)],
    )


def _logits_case(place: Place, rows: int, filters: str) -> Case:
    return Case(
        "sample_logits",
        {"rows": rows, "filters": filters},
        Work(4 * rows * VOCAB_SIZE, 0),
        partial(_make, place, rows, None, filters),
        partial(_expect, place),
        [Contender(OURS, bound(_our_draw), same_draw, allowed=1.0), *_peers(filters)[1:]],
    )


def _make(place: Place, rows: int, dim: int | None, filters: str) -> SampleInputs:
    device = place.device
    keys = DrawKeys(
        place.integers(2**62, 1),
        torch.arange(rows, device=device),
        torch.full((rows,), 100, device=device),
    )
    scalars = torch.tensor([GUIDANCE_SCALE, 1.0, *SETTINGS[filters]], device=device)
    settings = DrawSettings(scalars, filters != "none")
    if dim is None:
        logits = place.normal(rows, VOCAB_SIZE, scale=LOGIT_SPREAD, dtype=torch.float32)
        return SampleInputs(None, logits, keys, settings)
    cond = place.normal(rows, dim)
    uncond = (cond + place.normal(rows, dim, scale=BRANCH_DISTANCE)).contiguous()
    weight = place.normal(VOCAB_SIZE, dim, scale=LOGIT_SPREAD * dim**-0.5)
    return SampleInputs((cond, uncond, weight), None, keys, settings)


def _our_draw(inputs: SampleInputs, *, cond_logprobs: bool = False, support: bool = False) -> Drawn:
    if inputs.hidden is None:
        assert inputs.logits is not None
        draw = sample_logits(inputs.logits, inputs.keys, inputs.settings, support=support)
    else:
        draw = guided_sample(
            *inputs.hidden, inputs.keys, inputs.settings,
            cond_logprobs=cond_logprobs, support=support,
        )  # fmt: skip
    assert (draw.cond_logprobs is not None) == cond_logprobs
    assert (draw.support is not None) == support
    return Drawn(*draw)


def _ours(filters: str) -> list[Contender]:
    ours = Contender(OURS, bound(_our_draw), same_draw, allowed=1.0)
    more = Contender(
        f"{OURS}, conditional log-prob too",
        bound(partial(_our_draw, cond_logprobs=True)),
        # It mixes products instead of hidden states, which are not rounded then: every logit of a
        # half-precision policy differs, by half of `same_score` on average.
        partial(fair_draw, room=4.0),
        "also scores the token under the conditional branch alone: a second product",
        allowed=1.0,
    )
    if filters == "none":
        return [ours, more]
    kept = Contender(
        f"{OURS}, kept set too",
        bound(partial(_our_draw, support=True)),
        same_draw,
        "also returns the kept set as a bitmask",
        allowed=1.0,
    )
    return [ours, more, kept]


def _expect(place: Place, inputs: SampleInputs) -> RightDraw:
    if inputs.hidden is None:
        assert inputs.logits is not None
        logits = inputs.logits
        draw = sample_logits_reference(logits, inputs.keys, inputs.settings)
    else:
        cond, uncond, weight = inputs.hidden
        draw = guided_sample_reference(cond, uncond, weight, inputs.keys, inputs.settings)
        logits = _mixed_logits(inputs)
    _, temperature, top_k, top_p = inputs.settings.scalars.unbind()
    if inputs.settings.filtered:
        kept = filter_mask(logits, top_k, top_p, temperature)
        logits = logits.masked_fill(~kept, -torch.inf)
    same_score = _SAME_SCORE[torch.float32 if inputs.hidden is None else place.dtype]
    cond = None
    if inputs.hidden is not None:
        cond = torch.log_softmax(head_logits(inputs.hidden[0], inputs.hidden[2]), dim=1)
    return RightDraw(draw, torch.log_softmax(logits, dim=1), cond, same_score)


def same_draw(result: Drawn, right: RightDraw) -> float:
    """For draws with our keys: rows with another token too, over the rows that rounding may move.

    Two noisy logits lie within rounding in fewer than 1 row of 100.
    """
    other = int((result.token_ids != right.draw.token_ids).sum())
    return max(other / _movable(right), fair_draw(result, right))


def fair_draw(result: Drawn, right: RightDraw, room: float = 1.0) -> float:
    """For draws with any noise: rows whose token cannot be, or whose scores are not as they say.

    Args:
        result: a draw.
        right: of the same rows.
        room: how many times the distance of `same_score` is still the same.

    Returns:
        Their number, over the rows that rounding may move.
    """
    drawn = result.token_ids[:, None]
    true = right.log_probs.gather(1, drawn).squeeze(1)
    pairs = [(result.logprobs, true), (result.entropies, right.draw.entropies)]
    if right.cond_log_probs is not None:
        pairs.append((result.cond_logprobs, right.cond_log_probs.gather(1, drawn).squeeze(1)))
    wrong = ~true.isfinite()
    for score, wanted in pairs:
        if score is not None:
            wrong |= ~((score - wanted).abs() <= room * right.same_score)
    if result.support is not None:
        # Two sums of the mass before a top-p edge may lie on its two sides: one token.
        kept = unpack_support(result.support, right.log_probs.shape[1])
        wrong |= (kept != right.log_probs.isfinite()).sum(dim=1) > 1
        wrong |= ~kept.gather(1, drawn).squeeze(1)
    return int(wrong.sum()) / _movable(right)


def _movable(right: RightDraw) -> int:
    return max(1, len(right.log_probs) // 50)


def _mixed_logits(inputs: SampleInputs) -> Tensor:
    if inputs.hidden is None:
        assert inputs.logits is not None
        return inputs.logits
    cond, uncond, weight = inputs.hidden
    return head_logits(mix_hidden(cond, uncond, inputs.settings.scalars[0]), weight)


def _peers(filters: str) -> Sequence[Contender]:
    """The floor, for draws from hidden states, comes first."""
    top_k, top_p = SETTINGS[filters]

    def floor(inputs: SampleInputs) -> Call:
        assert inputs.hidden is not None
        hidden, weight = inputs.hidden[0], inputs.hidden[2].t()
        return lambda: torch.mm(hidden, weight)

    def drawing(sampler: Sampler) -> Callable[[SampleInputs], Call]:
        return bound(lambda inputs: sampler(filtered_logits(_mixed_logits(inputs), top_k, top_p)))

    def flashinfer(inputs: SampleInputs) -> Call:
        call = flashinfer_draw(lambda: _mixed_logits(inputs), top_k, top_p)
        return lambda: Drawn(*call())

    def peer(name: str, bind: Callable[[SampleInputs], Call], does: str = "the same") -> Contender:
        # Twice our room: a running sum of their own may put a filter's edge elsewhere.
        return Contender(name, bind, fair_draw, does, allowed=2.0)

    how = "" if filters == "none" else ", topk and sort"
    return [
        Contender(FLOOR, floor, None, "the product of one branch and the head, nothing else"),
        peer(f"torch multinomial{how}", drawing(multinomial_draw)),
        peer(f"torch exponential race{how}", drawing(race_draw)),
        peer("flashinfer", flashinfer, "no log-prob, no entropy"),
    ]


def filtered_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Top-k with every tie, then top-p by a sort, as eager PyTorch code does it."""
    if top_k:
        kth = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True)
        mass = ordered.softmax(dim=1)
        dropped = mass.cumsum(dim=1) - mass > top_p
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    return logits


def multinomial_draw(logits: Tensor) -> Drawn:
    """The library's draw from probabilities, with log-prob and entropy."""
    probs = logits.softmax(dim=1)
    return _scored(logits, probs, probs.multinomial(1))


def race_draw(logits: Tensor) -> Drawn:
    """The smallest of exponential times at rates p, as gpt-fast draws; no wait for the host."""
    probs = logits.softmax(dim=1)
    times = torch.empty_like(probs).exponential_(1)
    return _scored(logits, probs, (probs / times).argmax(dim=1, keepdim=True))


def _scored(logits: Tensor, probs: Tensor, token_ids: Tensor) -> Drawn:
    logprobs = logits.log_softmax(dim=1).gather(1, token_ids).squeeze(1)
    return Drawn(token_ids.squeeze(1), logprobs, torch.special.entr(probs).sum(dim=1))
