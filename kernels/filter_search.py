"""The top-k and top-p edges of one row inside a kernel, exact and without sorting.

Both edges are one question: the largest value v for which weight(x >= v) exceeds a target. For
top-k a token weighs 1 and the target is k - 1; for top-p it weighs its probability and the target
is p. The search halves the distance of two values, later of their order-preserving integer keys,
until one token lies between them (or all that do are equal): 10 to 18 rounds for rows that models
make, at most 52.

Top-k is these rounds and nothing else. Top-p has two passes more for the total, a count every
fourth round and one at the end, and up to 16 counts to find the last token of a cut tie: at most
52 + 13 + 3 + 16 passes. On chip a pass costs no bytes; at V = 16,384 it is 2 to 4 instructions a
logit, 33 to 66 thousand, and one reduction: by count 0.35 us with one row a multiprocessor. A
streamed row (V > 16,384) reads 4 V bytes a pass, twice that with both branches: 128 rows of 65,536
are 33.6 MB, 7.8 us at 4.3 TB/s. There is no product, so 790 TFLOP/s do not enter.

Probabilities are 32-bit integers of total just below 2^32. Their sums are exact, in whatever order
a GPU adds them, and a token is misplaced only if the mass before it lies within 2e-6 of p.

A row is a tuple (logits pointer, unconditional logits pointer or the same, guidance scale), read
in blocks of PARTS x WIDTH tokens. If one block is the whole row, its parts stay in registers as
the tuple `x`; otherwise each pass reads the blocks again. What a thread holds is added up before
threads have to talk, so that a pass ends in one reduction.
"""

import triton
import triton.language as tl

# Rounds on values before those on keys: 16 isolate one of 16,384 Gaussian logits, while rows with
# a huge range need the keys.
_VALUE_ROUNDS = tl.constexpr(20)
_ROUNDS_A_COUNT = tl.constexpr(4)  # of the top-p search: it costs as much as a round
_COUNT_BITS = tl.constexpr(20)
_COUNT_MASK = tl.constexpr((1 << 20) - 1)
# Below 2^32 by more than rounding can add: V / 2 from the integers, 1e-6 from the fp32 total.
_TOTAL_MASS = tl.constexpr(2.0**32 - 2.0**17)
_SIGN = tl.constexpr(0x80000000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_ALL_BITS = tl.constexpr(0xFFFFFFFF)  # the interpreter of Triton 3.6 cannot invert unsigned words


@triton.jit
def load_block(
    row, start, V: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, GUIDED: tl.constexpr
):
    """PARTS x [WIDTH] fp32 logits from token `start` on, guidance mixed in; -inf past token V."""
    x = ()
    for part in tl.static_range(PARTS):
        ids = start + part * WIDTH + tl.arange(0, WIDTH)
        value = tl.load(row[0] + ids, mask=ids < V, other=-float("inf"))
        if GUIDED:
            uncond = tl.load(row[1] + ids, mask=ids < V, other=0.0)
            value = uncond + row[2] * (value - uncond)
            if V % (WIDTH * PARTS) != 0:
                # A scale of 0 would mix the padding to NaN, a negative one to +inf.
                value = tl.where(ids < V, value, -float("inf"))
        x = x + (value,)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no stars)
    return x


@triton.jit
def row_extent(
    x, row, V: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, GUIDED: tl.constexpr
):
    """Largest value (NaN if any is), smallest above -inf, and how many are above -inf."""
    top = tl.full((WIDTH,), -float("inf"), tl.float32)
    bottom = tl.full((WIDTH,), float("inf"), tl.float32)
    counts = tl.full((WIDTH,), 0, tl.int32)
    for start in range(0, V, WIDTH * PARTS):
        block = x if WIDTH * PARTS >= V else load_block(row, start, V, WIDTH, PARTS, GUIDED)
        for part in tl.static_range(PARTS):
            value = block[part]
            finite = value > -float("inf")
            top = tl.maximum(top, value)
            bottom = tl.minimum(bottom, tl.where(finite, value, float("inf")))
            counts += finite.to(tl.int32) + ((value != value).to(tl.int32) << _COUNT_BITS)
    num_and_nan = tl.sum(counts.to(tl.int64))
    top_value = tl.where(num_and_nan > _COUNT_MASK, float("nan"), tl.max(top))
    return top_value, tl.min(bottom), (num_and_nan & _COUNT_MASK).to(tl.int32)


@triton.jit
def find_edges(
    x, row, extent, per_unit, top_k, top_p,
    V: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    """The kept set as (low, high, last_id): x >= high, or x >= low with a token id <= last_id.

    Args:
        extent: what `row_extent` gives.
        per_unit: log2(e) / temperature.
        top_k: int32; 0 or at least the number of finite values keeps all of those.
        top_p: fp32; 1 keeps all.
    """
    top, low, num_finite = extent
    high = top
    last_id = V
    if (top_k > 0) & (top_k < num_finite):
        bracket = (low, top, num_finite.to(tl.uint32))
        target = (top_k - 1).to(tl.uint32)
        low, high, _low, _high = _crossing(
            x, x, row, bracket, target, V, WIDTH, PARTS, GUIDED, False
        )
    if top_p < 1.0:
        low, high, last_id = _top_p_edge(x, row, top, low, per_unit, top_p, V, WIDTH, PARTS, GUIDED)
    return low, high, last_id


@triton.jit
def _top_p_edge(
    x, row, top, floor, per_unit, top_p,
    V: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    """`find_edges` among the tokens with x >= floor."""
    sums = tl.full((WIDTH,), 0, tl.float32)
    for start in range(0, V, WIDTH * PARTS):
        block = x if WIDTH * PARTS >= V else load_block(row, start, V, WIDTH, PARTS, GUIDED)
        for part in tl.static_range(PARTS):
            value = block[part]
            sums += tl.exp2(tl.where(value >= floor, (value - top) * per_unit, -float("inf")))
    weights = (top, floor, per_unit, _TOTAL_MASS / tl.sum(sums))
    mass = _masses(x, weights, PARTS) if WIDTH * PARTS >= V else weights
    whole = _total_mass(x, mass, row, V, WIDTH, PARTS, GUIDED)
    target = (top_p.to(tl.float64) * whole.to(tl.float64)).to(tl.uint32)
    low, high, mass_low, mass_high = _crossing(
        x, mass, row, (floor, top, whole), target, V, WIDTH, PARTS, GUIDED, True
    )
    ties = count_between(x, row, low, high, V, V, WIDTH, PARTS, GUIDED)
    # The crossing value may be shared: only the first tokens of that value are kept.
    each = tl.maximum((mass_low - mass_high) // tl.maximum(ties, 1).to(tl.uint32), 1)
    num_kept = ((target - mass_high) // each + 1).to(tl.int32)
    last_id = V
    if num_kept < ties:
        last_id = _id_of_tie(x, row, low, high, num_kept, V, WIDTH, PARTS, GUIDED)
    return low, high, last_id


@triton.jit
def _masses(block, weights, PARTS: tl.constexpr):
    """Probabilities as uint32; 0 below the floor."""
    top, floor, per_unit, to_integer = weights
    mass = ()
    for part in tl.static_range(PARTS):
        value = block[part]
        weight = tl.exp2(tl.where(value >= floor, (value - top) * per_unit, -float("inf")))
        integer = (weight * to_integer + 0.5).to(tl.uint32)
        mass = mass + (integer,)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no stars)
    return mass


@triton.jit
def _total_mass(
    x, mass, row,
    V: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    total = tl.full((WIDTH,), 0, tl.uint32)
    for start in range(0, V, WIDTH * PARTS):
        block = x if WIDTH * PARTS >= V else load_block(row, start, V, WIDTH, PARTS, GUIDED)
        masses = mass if WIDTH * PARTS >= V else _masses(block, mass, PARTS)
        for part in tl.static_range(PARTS):
            total += masses[part]
    return tl.sum(total)


@triton.jit
def _crossing(
    x, mass, row, bracket, target,
    V: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, GUIDED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Narrow [low, high) around the largest value whose weight(x >= value) exceeds the target.

    Args:
        bracket: smallest and largest value, and the weight of all from the smallest on.
        target: uint32; without WEIGHTED the search may end at low with a weight of target + 1.

    Returns:
        low, high, weight(x >= low), weight(x >= high).
    """
    smallest, largest, weight_low = bracket
    low = _key(smallest)
    high = _key(largest) + 1
    weight_high = weight_low * 0
    num_between = V
    num_rounds = 0
    while (high - low > 1) & (num_between > 1):
        if num_rounds < _VALUE_ROUNDS:
            middle = _key(0.5 * _value(low) + 0.5 * _value(high))
            middle = tl.maximum(tl.minimum(middle, high - 1), low + 1)
        else:
            middle = low + ((high - low) >> 1)
        weight = _weigh(x, mass, row, _value(middle), V, WIDTH, PARTS, GUIDED, WEIGHTED)
        exceeds = weight > target
        low = tl.where(exceeds, middle, low)
        high = tl.where(exceeds, high, middle)
        weight_low = tl.where(exceeds, weight, weight_low)
        weight_high = tl.where(exceeds, weight_high, weight)
        num_rounds += 1
        if WEIGHTED:
            if num_rounds % _ROUNDS_A_COUNT == 0:
                num_between = count_between(
                    x, row, _value(low), _value(high), V, V, WIDTH, PARTS, GUIDED
                )
        else:
            num_between = (weight_low - weight_high).to(tl.int32)
            num_between = tl.where(weight_low == target + 1, 1, num_between)
    return _value(low), _value(high), weight_low, weight_high


@triton.jit
def _weigh(
    x, mass, row, pivot,
    V: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, GUIDED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Weight of the tokens with x >= pivot, uint32."""
    weights = tl.full((WIDTH,), 0, tl.uint32)
    for start in range(0, V, WIDTH * PARTS):
        block = x if WIDTH * PARTS >= V else load_block(row, start, V, WIDTH, PARTS, GUIDED)
        if WEIGHTED:
            masses = mass if WIDTH * PARTS >= V else _masses(block, mass, PARTS)
        for part in tl.static_range(PARTS):
            above = block[part] >= pivot
            if WEIGHTED:
                weights += tl.where(above, masses[part], 0)
            else:
                weights += above.to(tl.uint32)
    return tl.sum(weights)


@triton.jit
def count_between(
    x, row, low, high, last_id,
    V: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    """Number of tokens up to last_id with low <= x < high."""
    counts = tl.full((WIDTH,), 0, tl.int32)
    for start in range(0, V, WIDTH * PARTS):
        block = x if WIDTH * PARTS >= V else load_block(row, start, V, WIDTH, PARTS, GUIDED)
        for part in tl.static_range(PARTS):
            # The scalar moves, not the ids: they would fill as many registers as the row.
            early = tl.arange(0, WIDTH) <= last_id - start - part * WIDTH
            counts += ((block[part] >= low) & (block[part] < high) & early).to(tl.int32)
    return tl.sum(counts)


@triton.jit
def _id_of_tie(
    x, row, low, high, rank,
    V: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    """Token id of the rank-th (from 1) token with low <= x < high."""
    before = -1
    found = V - 1
    while found - before > 1:
        middle = (before + found) // 2
        count = count_between(x, row, low, high, middle, V, WIDTH, PARTS, GUIDED)
        found = tl.where(count >= rank, middle, found)
        before = tl.where(count >= rank, before, middle)
    return found


@triton.jit
def _key(value):
    """fp32 -> uint32 of the same order; both zeros have one key, as they compare equal."""
    bits = (value + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(bits >= _SIGN, bits ^ _ALL_BITS, bits | _SIGN)


@triton.jit
def _value(key):
    """uint32 -> fp32, the inverse of `_key`."""
    bits = tl.where(key >= _SIGN, key & _MAGNITUDE, key ^ _ALL_BITS)
    return bits.to(tl.float32, bitcast=True)
