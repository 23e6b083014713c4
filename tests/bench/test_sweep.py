"""bench/sweep.py: what it tries, on what, and when something else wins."""

import importlib
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


def test_the_committed_constants_come_first_and_every_other_choice_once(sweep: ModuleType) -> None:
    module = SimpleNamespace(_WARPS=2, _BLOCK=512)
    tried = sweep.Sweep("op", module, {"_WARPS": (1, 2), "_BLOCK": (256, 512)}, []).candidates()
    pairs = [(one["_WARPS"], one["_BLOCK"]) for one in tried]
    assert pairs[0] == (2, 512)
    assert sorted(pairs) == [(1, 256), (1, 512), (2, 256), (2, 512)]


@pytest.mark.parametrize(("others", "winner"), [([98.0, 97.5], 0), ([98.0, 96.5], 2), ([], 0)])
def test_another_candidate_wins_by_three_percent_or_not_at_all(
    sweep: ModuleType, others: list[float], winner: int
) -> None:
    results = [sweep.Result({"_WARPS": i}, us) for i, us in enumerate([100.0, *others])]
    assert sweep.choose(results) is results[winner]


def test_constants_are_as_committed_after_a_failure(sweep: ModuleType) -> None:
    module = SimpleNamespace(_WARPS=2)
    with pytest.raises(RuntimeError), sweep.constants_set(module, {"_WARPS": 8}):
        assert module._WARPS == 8
        raise RuntimeError
    assert module._WARPS == 2


def test_every_constant_exists_and_its_committed_value_is_among_the_tried(
    sweep: ModuleType,
) -> None:
    for one in sweep.sweeps():
        for name, values in one.constants.items():
            assert getattr(one.module, name) in values, (one.op, name)


def test_a_case_gives_the_same_numbers_each_time_it_is_sampled(sweep: ModuleType) -> None:
    cpu = torch.device("cpu")
    for case in (
        sweep._attention_case(2, 3, heads=2, head_dim=8),
        sweep._rmsnorm_case(3, width=16),
        sweep._swiglu_case(3, width=16),
    ):
        first, second = (sweep._sample(case, cpu) for _ in range(2))
        assert torch.equal(first, second), case.name
        assert first.isfinite().all(), case.name
        assert case.work.num_bytes > 0
