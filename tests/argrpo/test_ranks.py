"""Processes that work together: what they tell each other, and what happens when one fails."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from argrpo.ranks import (
    PeerError,
    count_over_ranks,
    expect_alike,
    gather_images,
    gather_json,
    gather_rows,
    is_first,
    meet,
    node_leader_first,
    num_ranks,
    own_rank,
    sum_over_ranks,
)


def test_one_process_is_a_run_of_one_rank() -> None:
    rows = torch.randn(3, 2)
    assert (num_ranks(), own_rank(), is_first()) == (1, 0, True)
    assert meet("anywhere", wish=True) and not meet("anywhere")
    assert gather_rows(rows)[1] == slice(0, 3)
    assert torch.equal(gather_images(rows, torch.tensor([2, 0, 1])), rows[[1, 2, 0]])
    assert count_over_ranks(5) == 5


def _exchange() -> tuple[Tensor, slice, Tensor, Tensor, int, bool, bool]:
    rank = own_rank()
    rows = torch.full((rank, 2), float(rank))  # rank 0 has none
    ids = torch.tensor([[3, 0], [1, 4], [2, 5]][rank])
    together, own = gather_rows(rows)
    images = gather_images(ids[:, None].float(), ids)
    total = sum_over_ranks(torch.tensor([float(rank), 1.0]))
    wished, unwished = meet("here", wish=rank == 1), meet("there")
    return together, own, images, total, count_over_ranks(rank), wished, unwished


def test_rows_counts_and_wishes_reach_every_rank(run_ranks: Callable) -> None:
    for rank, ended in enumerate(run_ranks(3, _exchange)):
        together, own, images, total, count, wished, unwished = ended.result
        assert together.tolist() == [[1, 1], [2, 2], [2, 2]]
        assert own == (slice(0, 0), slice(0, 1), slice(1, 3))[rank]
        assert images.flatten().tolist() == [0, 1, 2, 3, 4, 5]
        assert total.tolist() == [3, 3]
        assert (count, wished, unwished) == (3, True, False)


def _find_or_make(path: Path) -> bool:
    with node_leader_first("file"):
        if path.exists():
            return False
        time.sleep(0.1)
        path.touch()
        return True


def test_the_first_process_of_a_machine_makes_what_the_others_find(
    run_ranks: Callable, tmp_path: Path
) -> None:
    made = [ended.result for ended in run_ranks(3, _find_or_make, tmp_path / "texts")]
    assert made == [True, False, False]


def _lists() -> list[dict[str, list[int | None]]]:
    return gather_json({"rank": [own_rank(), None]})


def test_what_json_can_say_is_gathered(run_ranks: Callable) -> None:
    assert gather_json([1]) == [[1]]
    for ended in run_ranks(2, _lists):
        assert ended.result == [{"rank": [0, None]}, {"rank": [1, None]}]


def _fails(error: type[BaseException]) -> None:
    meet("before")
    if own_rank() == 1:
        raise error("no such judge")
    # Work of its own, then an exchange in which rank 1 does not take part.
    time.sleep(0.2)
    gather_rows(torch.ones(1, 1))


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_a_rank_that_fails_takes_the_others_down_with_its_message(
    run_ranks: Callable, error: type[Exception]
) -> None:
    first, second = run_ranks(2, _fails, error)
    assert isinstance(second.result, error)
    assert isinstance(first.result, PeerError)
    assert str(first.result) == "rank 1 failed: no such judge"
    assert first.result.code == 1


def _all_fail() -> None:
    raise ValueError(f"rewards: expected one, got none on {own_rank()}")


def test_ranks_that_all_fail_raise_what_they_found(run_ranks: Callable) -> None:
    messages = [str(ended.result) for ended in run_ranks(2, _all_fail)]
    assert messages == [f"rewards: expected one, got none on {rank}" for rank in (0, 1)]


def _killed() -> None:
    meet("before")
    if own_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    meet("after")


def test_a_rank_that_is_killed_ends_the_others_at_once(run_ranks: Callable) -> None:
    started = time.monotonic()
    first, second, third = run_ranks(3, _killed)
    assert second.code == -signal.SIGKILL
    for survivor in (first, third):
        assert isinstance(survivor.result, PeerError)
        assert "expected all 3 at 'after'" in str(survivor.result)
        assert survivor.result.code == 74
    # The group's timeout is half an hour; a closed connection needs none of it.
    assert time.monotonic() - started < 20


def _part_ways() -> None:
    meet("here" if own_rank() == 0 else "there")


def test_ranks_at_different_places_do_not_exchange_anything(run_ranks: Callable) -> None:
    for ended in run_ranks(2, _part_ways):
        assert "stands elsewhere" in str(ended.result)


def _compare() -> None:
    expect_alike("settings", torch.tensor([1.0, torch.nan], dtype=torch.float64))
    expect_alike("weights", torch.tensor([own_rank()]))


def test_ranks_that_hold_other_numbers_say_of_what(run_ranks: Callable) -> None:
    for ended in run_ranks(2, _compare):
        assert "weights: expected the same on every rank, got others on rank 1" in str(ended.result)
