"""Cases of what follows a draw: its log, the inputs of the next step. S rows, D width, V tokens.

Every call moves the rows on by a token, so a contender has a log and positions of its own, with
room for all calls of a measurement: a row past its image would be idle.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from kernel_cases import (
    MODELS,
    OURS,
    VOCAB_SIZE,
    Case,
    Contender,
    Grid,
    Outputs,
    Place,
)
from timing import Call, Work

from argrpo.kernels.draw import Draw
from argrpo.kernels.record_draw import (
    DrawLog,
    FedEmbeddings,
    StepInputs,
    record_draw_,
    record_draw_reference_,
)

NUM_TOKENS = 576  # of an image of 384 pixels; 20 repeats of a hot call in 22 turns are 440
BRANCHES = 2
LOGS = ("scores", "scores and kept set")


Record: TypeAlias = Callable[[Draw, FedEmbeddings, StepInputs, DrawLog], None]


class RecordInputs(NamedTuple):
    """A draw at position 0 of every image."""

    draw: Draw
    embeddings: FedEmbeddings


class State(NamedTuple):
    """What a call writes to."""

    inputs: StepInputs
    log: DrawLog


def cases(place: Place, grid: Grid) -> Iterator[Case]:
    for model in grid.models:
        for rows in grid.rows:
            for logged in LOGS:
                yield _case(place, model, rows, logged)


def _case(place: Place, model: str, rows: int, logged: str) -> Case:
    dim = MODELS[model].dim
    # A token id and its two scores are read and written, the position too; the entry is written.
    small = 2 * (8 + 4 + 4) + 2 * 8 + BRANCHES * 8
    if logged != LOGS[0]:
        small += 2 * (4 + -(-VOCAB_SIZE // 8))
    num_bytes = rows * ((1 + BRANCHES) * dim * place.itemsize + small)
    return Case(
        "record_draw",
        {"model": model, "rows": rows, "logged": logged},
        Work(num_bytes, 0),
        partial(_make, place, rows, dim, logged != LOGS[0]),
        _expect,
        [
            Contender(OURS, partial(_bind, record_draw_), same_bits, allowed=1.0),
            Contender("torch eager", partial(_bind, _record_by_index), same_bits),
        ],
    )


def _make(place: Place, rows: int, dim: int, has_all: bool) -> RecordInputs:
    fp32 = torch.float32
    token_ids, scores = place.integers(VOCAB_SIZE, rows), place.normal(3, rows, dtype=fp32)
    kept = place.integers(256, rows, -(-VOCAB_SIZE // 8)).to(torch.uint8)
    more = (scores[2], kept) if has_all else (None, None)
    embeddings = FedEmbeddings(place.normal(VOCAB_SIZE, dim))
    return RecordInputs(Draw(token_ids, scores[0], scores[1], *more), embeddings)


def _state(inputs: RecordInputs) -> State:
    """Nothing is logged, all rows at position 0."""
    embeddings = inputs.embeddings.tokens
    rows = len(inputs.draw.token_ids)
    parts = (
        None if part is None else part.new_zeros(rows, NUM_TOKENS, *part.shape[1:])
        for part in inputs.draw
    )
    positions = torch.zeros(rows, dtype=torch.int64, device=embeddings.device)
    x = embeddings.new_zeros(BRANCHES, rows, embeddings.shape[1])
    entries = torch.full((BRANCHES, rows), -1, device=embeddings.device)
    return State(StepInputs(x, positions, entries), DrawLog(*parts))


def _bind(record: Record, inputs: RecordInputs) -> Call:
    state = _state(inputs)

    def call() -> Outputs:
        record(inputs.draw, inputs.embeddings, state.inputs, state.log)
        return (*state.inputs, *state.log)

    return call


def _expect(inputs: RecordInputs) -> Outputs:
    return _bind(record_draw_reference_, inputs)()


def same_bits(result: Outputs, expected: Outputs) -> float:
    """Nothing is computed, only moved: 0, or infinity where a bit is another."""
    is_same = all(
        one is other if one is None or other is None else torch.equal(one, other)
        for one, other in zip(result, expected, strict=True)
    )
    return 0.0 if is_same else float("inf")


def _record_by_index(
    draw: Draw, embeddings: FedEmbeddings, inputs: StepInputs, log: DrawLog
) -> None:
    """As eager PyTorch code does it, for rows that are not idle."""
    rows = torch.arange(len(draw.token_ids), device=embeddings.tokens.device)
    for kept, new in zip(log, draw, strict=True):
        if kept is not None and new is not None:
            kept[rows, inputs.positions] = new
    inputs.x.copy_(embeddings.tokens[draw.token_ids])
    inputs.entries.copy_(inputs.positions)
    inputs.positions.add_(1)
