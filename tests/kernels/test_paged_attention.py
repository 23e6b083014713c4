"""kernels/paged_attention.py against plain fp64 attention, at the edges of pages and positions.

Tolerances: in fp32 kernel and reference differ by the order of sums of at most a few hundred terms
of size 1, 2e-6 measured at most. In bf16 and fp16 both round q, k and the output; the kernel may
be twice as far from fp64 as the reference in the same dtype, plus one unit in the last place,
because Triton's interpreter truncates where a GPU rounds.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from argrpo.kernels.kv_pages import (
    KeyValuePages,
    PrefixAggregate,
    padded_head_dim,
    store_positions,
)
from argrpo.kernels.paged_attention import (
    paged_decode_attention,
    paged_decode_attention_reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP32_TOLERANCE = 2e-6
LAST_PLACE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: FP32_TOLERANCE}
HEADS = 2
NUM_PAGES = 3  # a sequence


@dataclass(frozen=True, eq=False)
class Step:
    """One decode step with everything before it already in the cache."""

    q: Tensor
    k: Tensor
    v: Tensor
    rotary: Tensor | None
    positions: Tensor
    pages: KeyValuePages
    block_table: Tensor
    prefix: PrefixAggregate | None

    def run(self) -> Tensor:
        """The op, on a copy of the cache."""
        return paged_decode_attention(*self._arguments(self.copied_pages()))

    def run_into(self, pages: KeyValuePages) -> Tensor:
        return paged_decode_attention(*self._arguments(pages))

    def _arguments(self, pages: KeyValuePages) -> tuple:
        return (
            *(self.q, self.k, self.v, self.rotary, self.positions),
            *(pages, self.block_table, self.prefix),
        )

    def copied_pages(self) -> KeyValuePages:
        return KeyValuePages(self.pages.keys.clone(), self.pages.values.clone())

    def reference(self, dtype: torch.dtype) -> Tensor:
        """The specification in another dtype, on a copy of the cache."""
        pages = KeyValuePages(self.pages.keys.to(dtype), self.pages.values.to(dtype))
        pages = pages if dtype != self.pages.keys.dtype else self.copied_pages()
        return paged_decode_attention_reference(
            *(side.to(dtype) for side in (self.q, self.k, self.v)),
            *(self.rotary, self.positions, pages, self.block_table, self.prefix),
        )

    def rows(self, rows: Tensor) -> "Step":
        """The same step of some sequences alone."""
        prefix = self.prefix
        if prefix is not None:
            prefix = PrefixAggregate(prefix.value_sums, prefix.counts, prefix.index[rows])
        return Step(
            *(self.q[rows], self.k[rows], self.v[rows], self.rotary, self.positions[rows]),
            *(self.pages, self.block_table[rows], prefix),
        )


def edge_positions(page_size: int) -> list[int]:
    return [0, 1, page_size - 1, page_size, page_size + 1, NUM_PAGES * page_size - 1]


def make_step(
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    *,
    page_size: int = 16,
    positions: list[int] | None = None,
    group: int = 1,
    rotary: bool = True,
    prefix: bool = True,
) -> Step:
    """Random inputs; pages in random order, every cache row that nobody wrote is NaN."""
    places = edge_positions(page_size) if positions is None else positions
    batch, kv_heads = len(places), HEADS // group
    packed = torch.randn(batch, 3, HEADS, head_dim).to(dtype)
    q, k, v = packed.unbind(1)
    shape = (batch * NUM_PAGES + 5, kv_heads, page_size, padded_head_dim(head_dim))
    pages = KeyValuePages(*(torch.full(shape, math.nan, dtype=dtype) for _ in range(2)))
    block_table = torch.randperm(shape[0])[: batch * NUM_PAGES].view(batch, NUM_PAGES).int()
    for row, place in enumerate(places):
        before = torch.arange(max(place, 0))[None]
        past = torch.randn(2, 1, before.numel(), kv_heads, head_dim).to(dtype)
        store_positions(pages, block_table[row : row + 1], before, *past)
    angles = torch.rand(NUM_PAGES * page_size, head_dim // 2) * 6
    aggregate = PrefixAggregate(
        3 * torch.randn(3, kv_heads, head_dim),
        torch.tensor([1.0, 120.0, 0.0]),
        torch.arange(batch) % 3,
    )
    aggregate.value_sums[2] = 0
    step = Step(
        *(q, k[:, :kv_heads], v[:, :kv_heads]),
        torch.stack([angles.cos(), angles.sin()], dim=-1) if rotary else None,
        torch.tensor(places),
        *(pages, block_table, aggregate if prefix else None),
    )
    return _moved(step)


def _moved(step: Step) -> Step:
    def to(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(DEVICE)

    prefix = step.prefix
    if prefix is not None:
        prefix = PrefixAggregate(to(prefix.value_sums), to(prefix.counts), to(prefix.index))
    return Step(
        *map(to, (step.q, step.k, step.v, step.rotary, step.positions)),
        *(KeyValuePages(*map(to, step.pages)), to(step.block_table), prefix),
    )


def check_against_fp64(step: Step) -> None:
    got, dtype = step.run(), step.q.dtype
    exact = step.reference(torch.float64)
    assert got.shape == step.q.shape
    assert got.dtype == dtype
    allowed = 2 * (step.reference(dtype).double() - exact).abs().max()
    allowed += LAST_PLACE[dtype] * exact.abs().max()
    assert (got.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 100, 128])
def test_every_head_size_matches_fp64_attention(head_dim: int) -> None:
    check_against_fp64(make_step(head_dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 100])
def test_half_precision_stays_within_its_rounding(head_dim: int, dtype: torch.dtype) -> None:
    check_against_fp64(make_step(head_dim, dtype))


@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_every_page_size_matches_fp64_attention(page_size: int) -> None:
    places = [0, page_size - 1, page_size, 2 * page_size + 1]
    check_against_fp64(make_step(page_size=page_size, positions=places))


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("rotary", [True, False])
def test_rotary_and_prefix_are_optional(rotary: bool, prefix: bool) -> None:
    check_against_fp64(make_step(positions=[0, 17, 47], rotary=rotary, prefix=prefix))


def test_heads_of_a_group_share_keys_and_values() -> None:
    step = make_step(group=2)
    check_against_fp64(step)
    spread = KeyValuePages(*(side.repeat_interleave(2, dim=1) for side in step.pages))
    prefix = step.prefix
    sums = prefix.value_sums.repeat_interleave(2, dim=1)
    alone = Step(
        *(step.q, step.k.repeat_interleave(2, dim=1), step.v.repeat_interleave(2, dim=1)),
        *(step.rotary, step.positions, spread, step.block_table),
        PrefixAggregate(sums, prefix.counts, prefix.index),
    )
    assert torch.equal(step.run(), alone.run())


def test_a_collapsed_prefix_equals_its_zero_keys_on_earlier_pages() -> None:
    """The 13 prefix positions of both forms: an aggregate, and keys of zero in the cache."""
    length = 13
    collapsed = make_step(positions=[0, 5, 20])
    values = torch.randn(3, length, HEADS, 64, device=DEVICE)
    zero_rows = torch.zeros(length, 32, 2, device=DEVICE)
    rotary = torch.cat([zero_rows, collapsed.rotary])
    pages = KeyValuePages(*(torch.zeros_like(side) for side in collapsed.pages))
    order = torch.arange(length, device=DEVICE).expand(3, -1)
    store_positions(pages, collapsed.block_table, order, torch.zeros_like(values), values)
    for row, place in enumerate([0, 5, 20]):
        table = collapsed.block_table[row : row + 1]
        at = torch.arange(place, device=DEVICE)[None]
        page, slot = table.long().gather(1, at // 16), at % 16
        past = [side[page, :, slot] for side in collapsed.pages]
        store_positions(pages, table, at + length, *past)
    full = Step(
        *(collapsed.q, collapsed.k, collapsed.v, rotary, collapsed.positions + length),
        *(pages, collapsed.block_table, None),
    )
    aggregate = PrefixAggregate(
        values.sum(dim=1),
        torch.full((3,), float(length), device=DEVICE),
        torch.arange(3, device=DEVICE),
    )
    collapsed = Step(
        *(collapsed.q, collapsed.k, collapsed.v, collapsed.rotary, collapsed.positions),
        *(collapsed.pages, collapsed.block_table, aggregate),
    )
    assert (full.run() - collapsed.run()).abs().max() <= FP32_TOLERANCE


def test_full_pages_are_shared_by_reference() -> None:
    """Two sequences name one first page; a third holds a copy of it."""
    step = make_step(positions=[16, 20, 20], prefix=False)
    table = step.block_table.clone()
    table[1, 0] = table[0, 0]
    for side in step.pages:
        side[table[2, 0]] = side[table[0, 0]]
        side[table[2, 1]] = side[table[1, 1]]
    q, k, v = (side.clone() for side in (step.q, step.k, step.v))
    for side in (q, k, v):
        side[2] = side[1]
    shared = Step(q, k, v, step.rotary, step.positions, step.pages, table, None)
    out = shared.run()
    assert torch.equal(out[1], out[2])
    check_against_fp64(shared)


def test_steps_in_a_row_equal_attention_over_the_whole_sequence() -> None:
    length, batch, head_dim = 20, 2, 32
    step = make_step(head_dim, positions=[0] * batch, prefix=False)
    q, k, v = torch.randn(3, length, batch, HEADS, head_dim, device=DEVICE)
    outs = []
    for t in range(length):
        at = torch.full((batch,), t, device=DEVICE)
        now = Step(q[t], k[t], v[t], step.rotary, at, step.pages, step.block_table, None)
        outs.append(now.run_into(step.pages))
    table = torch.view_as_complex(step.rotary[:length])[:, None, None]

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(-2).permute(1, 2, 0, 3)

    whole = torch.nn.functional.scaled_dot_product_attention(
        turned(q), turned(k), v.permute(1, 2, 0, 3), is_causal=True
    )
    got = torch.stack(outs).permute(1, 2, 0, 3)
    # Twice the tolerance: both sides round in fp32.
    assert (got - whole).abs().max() <= 2 * FP32_TOLERANCE


@pytest.mark.parametrize("head_dim", [64, 100])
def test_only_this_steps_row_of_the_cache_changes(head_dim: int) -> None:
    step = make_step(head_dim)
    after = step.copied_pages()
    step.run_into(after)
    expected = KeyValuePages(*(side.double() for side in step.pages))
    paged_decode_attention_reference(
        *(side.double() for side in (step.q, step.k, step.v)),
        *(step.rotary, step.positions, expected, step.block_table, step.prefix),
    )
    for got, want in zip(after, expected, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        assert (got.double() - want).nan_to_num().abs().max() <= FP32_TOLERANCE
    pages = step.block_table.gather(1, (step.positions // 16).long()[:, None])[:, 0].long()
    for side in after:
        assert not side[pages, :, (step.positions % 16).long(), head_dim:].any()


def test_an_idle_row_stores_nothing_and_gives_zeros() -> None:
    step = make_step(positions=[3, -1, 20])
    after = step.copied_pages()
    out = step.run_into(after)
    assert not out[1].any()
    own = step.block_table[1].long()
    for side in after:
        assert side[own].isnan().all()
    check_against_fp64(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch_or_on_its_pages(dtype: torch.dtype) -> None:
    step = make_step(dtype=dtype)
    together = step.run()
    assert torch.equal(together, step.run())
    for row in (1, 4, 5):
        alone = step.rows(torch.tensor([row], device=DEVICE)).run()
        assert torch.equal(alone[0], together[row])
    order = torch.randperm(len(step.pages.keys), device=DEVICE)
    pages = KeyValuePages(*(torch.empty_like(side) for side in step.pages))
    for new, old in zip(pages, step.pages, strict=True):
        new[order] = old
    moved = Step(
        *(step.q, step.k, step.v, step.rotary, step.positions),
        *(pages, order[step.block_table.long()].int(), step.prefix),
    )
    assert torch.equal(moved.run(), together)


def test_entries_of_the_block_table_past_the_position_are_not_read() -> None:
    step = make_step(positions=[-1, 0, 15, 16, 31, 47])
    expected = step.run(), step.reference(torch.float32)
    first_unread = (step.positions // 16 + 1)[:, None]
    unread = torch.arange(NUM_PAGES, device=DEVICE) >= first_unread
    step.block_table[unread] = 2**30
    assert torch.equal(step.run(), expected[0])
    assert torch.equal(step.reference(torch.float32), expected[1])


def test_scores_far_from_the_prefix_score_of_zero_stay_finite() -> None:
    """Own scores of 7,200 and -7,200, the latter beside a prefix of 120 and beside one of none."""
    step = make_step(positions=[20, 0, 0], rotary=False)
    step.q[:] = 30.0
    step.k[0], step.k[1:] = 30.0, -30.0
    check_against_fp64(step)
    mean = step.prefix.value_sums[1] / step.prefix.counts[1]
    assert (step.run()[1] - mean).abs().max() <= FP32_TOLERANCE
    assert (step.run()[2] - step.v[2]).abs().max() <= FP32_TOLERANCE


def test_positions_may_be_int32_and_a_batch_may_be_empty() -> None:
    step = make_step(positions=[3, 17])
    narrow = Step(
        *(step.q, step.k, step.v, step.rotary, step.positions.int()),
        *(step.pages, step.block_table, step.prefix),
    )
    assert torch.equal(narrow.run(), step.run())
    assert step.rows(torch.arange(0, device=DEVICE)).run().shape == (0, HEADS, 64)


def test_a_page_beyond_two_to_the_31_elements_is_addressed() -> None:
    num_pages = 2**31 // (128 * 128) + 1
    shape = (num_pages, 1, 128, 128)
    if DEVICE.type == "cuda":
        pages = [torch.zeros(shape, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    else:
        # NumPy's zeros cost no memory until written; torch's would take 8 GiB.
        pages = [torch.from_numpy(np.zeros(shape, np.float16)) for _ in range(2)]
    q, k, v = torch.randn(3, 1, 1, 128, device=DEVICE).half()
    last = num_pages - 1
    for side in pages:
        side[last, 0, 0] = 1.0
    table = torch.tensor([[last]], dtype=torch.int32, device=DEVICE)
    at = torch.tensor([1], device=DEVICE)
    out = paged_decode_attention(q, k, v, None, at, KeyValuePages(*pages), table)
    assert torch.equal(pages[1][last, 0, 1], v[0, 0])
    scores = q[0, 0].double() @ torch.stack([pages[0][last, 0, i].double() for i in (0, 1)]).T
    weights = (scores / math.sqrt(128)).softmax(dim=0)
    expected = weights[0] + weights[1] * v[0, 0].double()
    assert (out[0, 0].double() - expected).abs().max() <= 4 * LAST_PLACE[torch.float16]


@pytest.mark.gpu
def test_a_captured_step_follows_positions_and_inputs_that_change_on_the_device() -> None:
    step = make_step(dtype=torch.bfloat16, positions=[0, 0, 0])
    steps = torch.randn(3, *step.q.shape, device=DEVICE).bfloat16()
    eager = step.copied_pages()
    outs = []
    for t in range(3):
        step.q.copy_(steps[t])
        step.positions.fill_(t)
        outs.append(step.run_into(eager))
    step.positions.fill_(0)
    captured = step.copied_pages()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step.run_into(captured)
    for t in range(3):
        step.q.copy_(steps[t])
        step.positions.fill_(t)
        graph.replay()
        assert torch.equal(out, outs[t])


def _bad_calls() -> list[tuple[str, dict]]:
    step = make_step(positions=[1, 2])
    wide = torch.randn(2, HEADS, 128, device=DEVICE)
    return [
        (r"q: expected shape \[\*, \*, \*\], got \[2, 64\]", {"q": step.q[:, 0]}),
        (r"q: expected a last dimension without gaps", {"q": wide[..., ::2]}),
        (r"q: expected bfloat16, float16 or float32, got float64", {"q": step.q.double()}),
        (r"q: expected an even head size of at most 128, got 65", {"q": wide[..., :65]}),
        (r"k: expected shape \[2, \*, 64\]", {"k": step.k[:1]}),
        (r"k: expected float32, got bfloat16", {"k": step.k.bfloat16()}),
        (r"k: expected a divisor of 2 heads, got 3", {"k": wide[:, :1, :64].expand(2, 3, 64)}),
        (r"v: expected shape \[2, 2, 64\]", {"v": step.v[:, :1]}),
        (r"rotary: expected shape \[\*, 32, 2\]", {"rotary": step.rotary[:, :16]}),
        (r"rotary: expected float32", {"rotary": step.rotary.bfloat16()}),
        (r"positions: expected shape \[2\]", {"positions": step.positions[:1]}),
        (r"positions: expected int64 or int32", {"positions": step.positions.float()}),
        (
            r"pages.keys: expected shape \[\*, 2, \*, 64\]",
            {"pages": KeyValuePages(*(side[..., :32] for side in step.pages))},
        ),
        (
            r"pages.values: expected shape",
            {"pages": KeyValuePages(step.pages.keys, step.pages.values[:1])},
        ),
        (
            r"pages.keys: expected a contiguous tensor",
            {"pages": KeyValuePages(*(side[:, :, ::2] for side in step.pages))},
        ),
        (
            r"pages.keys: expected a page size in \(16, 32, 64, 128\), got 8",
            {"pages": KeyValuePages(*(side[:, :, :8].contiguous() for side in step.pages))},
        ),
        (r"block_table: expected int32", {"block_table": step.block_table.long()}),
        (r"block_table: expected at least one page", {"block_table": step.block_table[:, :0]}),
        (r"block_table: expected a contiguous", {"block_table": step.block_table[:, ::2]}),
        (
            r"prefix.value_sums: expected float32",
            {"prefix": replace(step.prefix, value_sums=step.prefix.value_sums.bfloat16())},
        ),
        (
            r"prefix.counts: expected shape \[3\]",
            {"prefix": replace(step.prefix, counts=step.prefix.counts[:2])},
        ),
        (
            r"prefix.index: expected shape \[2\]",
            {"prefix": replace(step.prefix, index=step.prefix.index[:1])},
        ),
    ]


def test_wrong_inputs_are_refused_by_name() -> None:
    step = make_step(positions=[1, 2])
    good = {
        name: getattr(step, name)
        for name in ("q", "k", "v", "rotary", "positions", "pages", "block_table", "prefix")
    }
    for words, changed in _bad_calls():
        with pytest.raises(ValueError, match=words):
            paged_decode_attention(**(good | changed))
