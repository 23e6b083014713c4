"""bench/sweep.py and sweep_cases.py: what they try, on what, and when something else wins."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; it imports the file beside it, as when it is run."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("sweep")


@pytest.fixture
def tried(sweep: ModuleType) -> ModuleType:
    """What the script tries."""
    return importlib.import_module("sweep_cases")


def test_the_committed_constants_come_first_and_every_other_choice_once(tried: ModuleType) -> None:
    module = SimpleNamespace(_WARPS=2, _BLOCK=512)
    constants = {"_WARPS": (1, 2), "_BLOCK": (256, 512)}
    pairs = [
        (one["_WARPS"], one["_BLOCK"])
        for one in tried.Sweep("op", module, constants, []).candidates()
    ]
    assert pairs[0] == (2, 512)
    assert sorted(pairs) == [(1, 256), (1, 512), (2, 256), (2, 512)]


@pytest.mark.parametrize(("others", "winner"), [([98.0, 97.5], 0), ([98.0, 96.5], 2), ([], 0)])
def test_another_candidate_wins_by_three_percent_or_not_at_all(
    tried: ModuleType, others: list[float], winner: int
) -> None:
    times = enumerate([100.0, *others])
    results = [tried.Result({"_WARPS": i}, (us / 4, 3 * us / 4)) for i, us in times]
    assert tried.choose(results) is results[winner]


SIZES = (32, 64, 128, 256)


@pytest.mark.parametrize(
    ("fused", "bound"),
    [
        ((5, 5, 20, 40), 64),  # as committed
        ((5, 10.2, 20, 40), 64),  # 2 % slower at 64: not enough to leave it
        ((5, 9.8, 9.8, 40), 64),  # 2 % faster at 128: not enough to take it
        ((5, 10.4, 20, 40), 32),
        ((5, 5, 9, 40), 128),
        ((5, 5, 9, 9), 256),
        ((5, 5, 11, 9), 64),  # ahead again past the crossing: one bound cannot say that
        ((11, 5, 5, 5), 0),
    ],
)
def test_a_bound_of_two_paths_is_where_their_times_cross(
    tried: ModuleType, fused: tuple[float, ...], bound: int
) -> None:
    library = (10.0,) * 4
    committed = (*fused[:2], *library[2:])
    measured = {64: committed, 0: library, 256: fused}
    results = [tried.Result({"_BOUND": rows}, times) for rows, times in measured.items()]
    chosen = tried.choose_bound(SIZES, results)
    assert chosen.constants == {"_BOUND": bound}
    taken = zip(SIZES, fused, library, strict=True)
    assert chosen.medians_us == tuple(one if size <= bound else other for size, one, other in taken)


def test_a_committed_bound_between_the_sizes_measured_stays(tried: ModuleType) -> None:
    fused, library = (5.0, 5.0, 20.0, 20.0), (10.0,) * 4
    measured = {96: (5.0, 5.0, 10.0, 10.0), 0: library, 256: fused}
    results = [tried.Result({"_BOUND": rows}, times) for rows, times in measured.items()]
    assert tried.choose_bound(SIZES, results).constants == {"_BOUND": 96}


def test_both_paths_are_measured_at_every_size_that_the_bound_is_chosen_from(
    tried: ModuleType,
) -> None:
    fused = next(one for one in tried.sweeps() if one.op == "fused_rows")
    bounds = fused.constants["_MAX_FUSED_ROWS"]
    assert min(bounds) == 0
    assert max(bounds) >= tried.FUSED_ROWS[-1]
    assert [
        f"rows {rows}," in case.name
        for rows, case in zip(tried.FUSED_ROWS, fused.cases, strict=True)
    ] == [True] * len(fused.cases)
    # The sum over 16 to 256 rows would say that one path wins everywhere.
    assert fused.choose is not tried.choose


@pytest.mark.parametrize(("times", "wins"), [((100.0, 96.0), True), ((100.0, 98.0), False)])
def test_a_row_names_the_winner_and_what_it_is_compared_with(
    sweep: ModuleType, tried: ModuleType, times: tuple[float, float], wins: bool
) -> None:
    one = tried.Sweep("op", SimpleNamespace(_WARPS=2), {"_WARPS": (2, 4)}, [])
    results = [
        tried.Result({"_WARPS": warps}, (us,)) for warps, us in zip((2, 4), times, strict=True)
    ]
    row = sweep.winner_row(one, results)
    assert row["wins"] is wins
    assert row["constants"] == str({"_WARPS": 4 if wins else 2})
    assert (row["committed"], row["committed_us"]) == ("{'_WARPS': 2}", 100.0)
    assert row["total_us"] == (96.0 if wins else 100.0)
    with pytest.raises(RuntimeError, match="expected times of the committed"):
        sweep.winner_row(one, results[1:])


def test_main_appends_the_winner_after_the_candidates(
    sweep: ModuleType, tried: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = SimpleNamespace(_WARPS=2)
    case = tried.Case("one", lambda device: lambda: torch.ones(1), tried.Work(1, 1))
    one = tried.Sweep("op", module, {"_WARPS": (2, 4)}, [case])
    times = {2: 100.0, 4: 50.0}

    def timed(*_: object) -> object:
        us = times[module._WARPS]
        return SimpleNamespace(p20_us=us, p50_us=us, p80_us=us)

    output = tmp_path / "sweep.jsonl"
    monkeypatch.setattr(sweep, "sweeps", lambda: [one])
    monkeypatch.setattr(sweep, "_time", timed)
    monkeypatch.setattr(
        sweep, "measure_ceilings", lambda *_: SimpleNamespace(percent=lambda *_: 50.0)
    )
    monkeypatch.setattr(sweep, "environment", lambda device: {"device": "some GPU"})
    monkeypatch.setattr(sweep, "chosen_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(sys, "argv", ["sweep", "--op", "op", "--output", str(output)])
    sweep.main()
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["case"] for row in rows] == ["one", "one", "winner"]
    assert (rows[-1]["constants"], rows[-1]["device"]) == ("{'_WARPS': 4}", "some GPU")


def test_other_tiles_of_a_row_still_keep_it_on_chip_or_stream_it(
    sweep: ModuleType, tried: ModuleType
) -> None:
    of_op = {one.op: one for one in tried.sweeps()}
    for op, vocab_size, is_kept in (
        ("sample_rows", 16384, True),
        ("sample_rows_long", 65536, False),
    ):
        tiles = []
        for constants in of_op[op].candidates():
            with sweep.constants_set(of_op[op].module, constants):
                tiles.append(of_op[op].module.row_tile(vocab_size))
        assert len(set(tiles)) == len(tiles), "each candidate is another kernel"
        assert all((tile.width * tile.parts >= vocab_size) is is_kept for tile in tiles)


def test_constants_are_as_committed_after_a_failure(sweep: ModuleType) -> None:
    module = SimpleNamespace(_WARPS=2)
    with pytest.raises(RuntimeError), sweep.constants_set(module, {"_WARPS": 8}):
        assert module._WARPS == 8
        raise RuntimeError
    assert module._WARPS == 2


def test_every_constant_exists_and_its_committed_value_is_among_the_tried(
    tried: ModuleType,
) -> None:
    for one in tried.sweeps():
        for name, values in one.constants.items():
            assert getattr(one.module, name) in values, (one.op, name)


def test_a_case_gives_the_same_numbers_each_time_it_is_sampled(
    sweep: ModuleType, tried: ModuleType
) -> None:
    cpu = torch.device("cpu")
    for case in (
        tried._attention_case(2, 3, heads=2, head_dim=8),
        tried._rmsnorm_case(3, width=16),
        tried._swiglu_case(3, width=16),
        tried._row_case(3, 64, "k and p"),
    ):
        first, second = (sweep._sample(case, cpu) for _ in range(2))
        assert torch.equal(first, second), case.name
        assert first.isfinite().all(), case.name
        assert case.work.num_bytes > 0
