"""bench/result_rows.py: where a row was measured, and by which code."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The file as a module; bench/ is no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("result_rows")
    sys.modules.pop("result_rows", None)


@pytest.fixture
def checkout(rows: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of code without git."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "op.py").write_text("x = 1", encoding="utf-8")
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def test_a_row_is_one_line_that_says_where_it_was_measured(
    rows: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "results" / "kernels.jsonl"
    assert rows.rows_in(path) == []
    for p50_us in (1.5, 2.5):
        row = {"op": "rmsnorm", "p50_us": p50_us, **rows.environment(torch.device("cpu"))}
        rows.append_row(path, row)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    found = rows.rows_in(path)
    assert [row["p50_us"] for row in found] == [1.5, 2.5]
    assert found[0]["torch"] == torch.__version__
    assert {"device", "triton", "python", "commit"} <= found[0].keys()


def test_without_a_commit_the_code_itself_is_named(rows: ModuleType, checkout: Path) -> None:
    before = rows.commit_described()
    assert before.startswith("unknown.")
    assert rows.commit_described() == before
    (checkout / "kernels" / "op.py").write_text("x = 2", encoding="utf-8")
    assert rows.commit_described() != before


@pytest.mark.parametrize(("described", "is_whole"), [("2b6f3a1", True), ("2b6f3a1-dirty", False)])
def test_a_clean_commit_needs_no_digest(
    rows: ModuleType, monkeypatch: pytest.MonkeyPatch, described: str, is_whole: bool
) -> None:
    monkeypatch.setattr(rows, "_first_line", lambda *command: described)
    assert (rows.commit_described() == described) is is_whole
    assert rows.commit_described().startswith(described)


def test_rows_of_other_code_or_another_machine_are_not_alike(
    rows: ModuleType, tmp_path: Path
) -> None:
    facts = {"commit": "a", "device": "gpu", "torch": "2", "triton": "3"}
    path = tmp_path / "rows.jsonl"
    for row in (facts, {**facts, "commit": "b"}, {**facts, "device": "cpu"}, {"commit": "a"}):
        path.open("a").write(json.dumps(row) + "\n")
    assert rows.rows_like(path, facts) == [facts]
