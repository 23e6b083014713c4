"""kernels/record_draw.py: the log of a draw and the inputs of the next step, bit for bit.

Nothing is computed, only moved, so kernel and reference must agree exactly.
"""

import pytest
import torch
from torch import Tensor

from argrpo.kernels import record_draw as module
from argrpo.kernels.draw import Draw
from argrpo.kernels.record_draw import (
    DrawLog,
    FedEmbeddings,
    StepInputs,
    record_draw_,
    record_draw_reference_,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
V, T, S = 40, 6, 5
POSITIONS = [0, 3, T - 1, T, T + 9]  # first, middle, last, finished, idle for long


@pytest.fixture(params=["kernel", "reference"])
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "reference":
        monkeypatch.setattr(module, "uses_triton", lambda tensor: False)


def some_draw(*, cond: bool = True, support: bool = True) -> Draw:
    return Draw(
        torch.randint(0, V, (S,), device=DEVICE),
        torch.randn(S, device=DEVICE),
        torch.randn(S, device=DEVICE),
        torch.randn(S, device=DEVICE) if cond else None,
        torch.randint(0, 256, (S, V // 8), dtype=torch.uint8, device=DEVICE) if support else None,
    )


def log_like(draw: Draw) -> DrawLog:
    """Room for S images, holding what no draw holds."""

    def room(part: Tensor | None, value: int) -> Tensor | None:
        if part is None:
            return None
        return torch.full((S, T, *part.shape[1:]), value, dtype=part.dtype, device=DEVICE)

    return DrawLog(*(room(part, value) for part, value in zip(draw, (-7, 9, 9, 9, 3), strict=True)))


def inputs_at(positions: list[int], branches: int, width: int) -> StepInputs:
    at = torch.tensor(positions, device=DEVICE)
    entries = torch.full((branches, S), 77, device=DEVICE)
    return StepInputs(torch.zeros(branches, S, width, device=DEVICE), at, entries)


def copied(record: DrawLog | StepInputs) -> list[Tensor | None]:
    return [None if part is None else part.clone() for part in record]


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("width", [1, 100, 768])
@pytest.mark.parametrize("first_entry", [0, 120])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("num_places", [0, T - 1, T + 4])
def test_the_kernel_moves_what_the_reference_moves(
    branches: int, width: int, first_entry: int, optional: bool, num_places: int
) -> None:
    draw = some_draw(cond=optional, support=optional)
    places = torch.randn(num_places, width, device=DEVICE) if num_places else None
    embeddings = FedEmbeddings(torch.randn(V, width, device=DEVICE), places)
    results = []
    for record in (record_draw_, record_draw_reference_):
        log, inputs = log_like(draw), inputs_at(POSITIONS, branches, width)
        record(draw, embeddings, inputs, log, first_entry)
        results.append([*copied(log), *copied(inputs)])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.usefixtures("_path")
def test_a_draw_is_logged_where_its_row_stands_and_nowhere_else() -> None:
    draw, embeddings = some_draw(), FedEmbeddings(torch.randn(V, 8, device=DEVICE))
    log, inputs = log_like(draw), inputs_at(POSITIONS, 2, 8)
    empty = copied(log)
    record_draw_(draw, embeddings, inputs, log)
    for row, position in enumerate(POSITIONS):
        for kept, drawn, untouched in zip(log, draw, empty, strict=True):
            expected = untouched[row]
            if position < T:
                expected[position] = drawn[row]
            assert torch.equal(kept[row], expected)


@pytest.mark.usefixtures("_path")
def test_both_branches_are_fed_the_token_and_finished_rows_become_idle() -> None:
    draw, embeddings = some_draw(), FedEmbeddings(torch.randn(V, 8, device=DEVICE))
    inputs = inputs_at(POSITIONS, 2, 8)
    record_draw_(draw, embeddings, inputs, log_like(draw), first_entry=3)
    assert torch.equal(inputs.x, embeddings.tokens[draw.token_ids].expand(2, S, 8))
    assert inputs.positions.tolist() == [position + 1 for position in POSITIONS]
    # The token of the last position is never fed: its row is idle from here on.
    assert inputs.entries.tolist() == [[3, 6, -1, -1, -1]] * 2


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learned_place_is_added_once_rounded_and_the_last_one_is_the_last(
    dtype: torch.dtype,
) -> None:
    draw, tokens = some_draw(), torch.randn(V, 8, device=DEVICE).to(dtype)
    # Halves of small integers, so that every sum is exact in bf16 too.
    tokens, places = tokens.mul(8).round() / 2, torch.arange(T - 1.0, device=DEVICE).to(dtype)
    places = places[:, None].repeat(1, 8)
    inputs = inputs_at(POSITIONS, 2, 8)
    inputs = inputs._replace(x=inputs.x.to(dtype))
    record_draw_(draw, FedEmbeddings(tokens, places), inputs, log_like(draw))
    added = torch.tensor([0, 3, T - 2, T - 2, T - 2], device=DEVICE)[:, None]
    assert torch.equal(inputs.x, (tokens[draw.token_ids] + added).expand(2, S, 8))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (torch.zeros(T - 2, 8), "embeddings.places: expected at least 5 rows"),
        (torch.zeros(T, 7), "embeddings.places: expected shape"),
        (torch.zeros(T, 8).bfloat16(), "embeddings.places: expected float32"),
        (torch.zeros(T, 16)[:, ::2], "embeddings.places: expected a contiguous"),
    ],
)
def test_places_that_do_not_fit_are_refused_by_name(places: Tensor, message: str) -> None:
    draw = some_draw()
    embeddings = FedEmbeddings(torch.randn(V, 8, device=DEVICE), places.to(DEVICE))
    with pytest.raises(ValueError, match=message):
        record_draw_(draw, embeddings, inputs_at(POSITIONS, 2, 8), log_like(draw))


@pytest.mark.usefixtures("_path")
def test_some_rows_can_be_recorded_and_the_others_stay() -> None:
    draw, embeddings = some_draw(support=False), FedEmbeddings(torch.randn(V, 8, device=DEVICE))
    log, inputs = log_like(draw), inputs_at(POSITIONS, 2, 8)
    before_log, before = log_like(draw), inputs_at(POSITIONS, 2, 8)
    part = slice(1, 3)
    some = Draw(*(None if one is None else one[part] for one in draw))
    record_draw_(some, embeddings, inputs.rows(part), log.rows(part))
    assert inputs.positions.tolist() == [0, 4, T, T, T + 9]
    assert log.token_ids[1, 3] == draw.token_ids[1]
    others = [0, 3, 4]
    assert torch.equal(log.token_ids[others], before_log.token_ids[others])
    assert torch.equal(log.logprobs[others], before_log.logprobs[others])
    assert torch.equal(inputs.x[:, others], before.x[:, others])
    assert torch.equal(inputs.entries[:, others], before.entries[:, others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draw": {"logprobs": torch.zeros(S - 1)}}, "draw.logprobs: expected shape"),
        ({"draw": {"support": None}}, "log.support: expected it exactly where draw.support is"),
        ({"inputs": {"positions": torch.zeros(S)}}, "inputs.positions: expected int64"),
        ({"inputs": {"x": torch.zeros(2, S, 7)}}, "inputs.x: expected shape"),
        ({"inputs": {"x": torch.zeros(2, S, 16)[..., ::2]}}, "inputs: expected the rows"),
        ({"log": {"entropies": torch.zeros(S, T + 1)}}, "log.entropies: expected shape"),
        ({"log": {"entropies": torch.zeros(T, S).t()}}, "log.entropies: expected a contiguous"),
        ({"inputs": {"positions": torch.zeros(2 * S).long()[::2]}}, "inputs.positions: expected a"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    change: dict[str, dict[str, Tensor | None]], message: str
) -> None:
    draw, embeddings = some_draw(), FedEmbeddings(torch.randn(V, 8, device=DEVICE))
    log, inputs = log_like(draw), inputs_at(POSITIONS, 2, 8)
    changed = {
        name: {key: None if part is None else part.to(DEVICE) for key, part in parts.items()}
        for name, parts in change.items()
    }
    with pytest.raises(ValueError, match=message):
        record_draw_(
            draw._replace(**changed.get("draw", {})),
            embeddings,
            inputs._replace(**changed.get("inputs", {})),
            log._replace(**changed.get("log", {})),
        )


@pytest.mark.gpu
def test_a_wide_row_moves_its_position_once() -> None:
    """Several warps read the position that one of them moves on."""
    num_rows, width = 4096, 3200
    embeddings = FedEmbeddings(torch.randn(V, width, device=DEVICE).bfloat16())
    tokens = torch.randint(0, V, (num_rows,), device=DEVICE)
    scores = torch.randn(num_rows, device=DEVICE)
    draw = Draw(tokens, scores, scores, None, None)
    log = DrawLog(
        torch.full((num_rows, T), -7, device=DEVICE),
        *torch.zeros(2, num_rows, T, device=DEVICE),
        None,
        None,
    )
    x = torch.zeros(2, num_rows, width, device=DEVICE, dtype=torch.bfloat16)
    start = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
    entries = torch.zeros(2, num_rows, dtype=torch.int64, device=DEVICE)
    for step in range(T):
        record_draw_(draw, embeddings, StepInputs(x, start, entries), log)
        assert (start == step + 1).all()
        assert (log.token_ids[:, step] == tokens).all()
