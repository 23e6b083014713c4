"""bench/turns.py: memory that contenders share."""

import importlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("turns")
    for name in ("turns", "timing"):
        sys.modules.pop(name, None)


def faults_of(times: int) -> int:
    """Pages that this process asks for while it makes 64 MiB and lets go of them so often."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_taken_again_without_the_system_and_given_back_at_the_end(
    turns: ModuleType,
) -> None:
    outside = faults_of(4)
    with turns.kept_heap():
        faults_of(1)  # takes it
        # Other threads of the process may ask for a few; huge pages are 32 to such a tensor.
        assert faults_of(4) < outside / 4
    assert faults_of(4) > outside / 4
