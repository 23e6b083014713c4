"""Bytes that a stretch of code holds at most."""

import pytest
import torch
from torch import Tensor

from argrpo.peak_memory import memory_use

CPU = torch.device("cpu")
KILO = 4000  # bytes of 1000 fp32 numbers


def test_tensors_count_from_their_making_to_their_freeing() -> None:
    def run() -> None:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second * 2  # the third is made when the first is gone
        del second, third

    assert memory_use(run, CPU) == (2 * KILO, 0)


def test_views_and_what_stood_before_cost_nothing() -> None:
    given = torch.zeros(1000)

    def run() -> Tensor:
        given.add_(1.0)
        return given.view(10, 100).t()[2:]

    assert memory_use(run, CPU) == (0, 0)


def test_a_result_is_kept_and_so_is_what_a_backward_pass_will_need() -> None:
    given = torch.zeros(1000, requires_grad=True)
    use = memory_use(lambda: (given.exp() * 2.0).exp(), CPU)
    # exp keeps its result, twice; the product keeps nothing
    assert use.kept == 2 * KILO
    assert use.peak == 3 * KILO


@pytest.mark.gpu
def test_a_gpu_counts_by_its_allocator() -> None:
    use = memory_use(lambda: torch.zeros(2**20, device="cuda"), torch.device("cuda"))
    assert use == (2**22, 2**22)
