"""What is remembered of images, where frozen networks stand, and what judges take."""

import pytest
import torch
from torch import Tensor, nn

from argrpo.data import Prompt
from argrpo.engine.ranges import no_ranges
from argrpo.rewards.image_distance import MseReward
from argrpo.rewards.lanes import LocalLane
from argrpo.rewards.sharing import ImageMemo, Residence


def test_what_is_remembered_goes_with_the_images_and_when_they_change() -> None:
    memo = ImageMemo()
    calls: list[int] = []

    def total(images: Tensor, _: list[int]) -> Tensor:
        calls.append(len(images))
        return images.flatten(1).sum(1, keepdim=True)

    images = torch.ones(3, 1, 2, 2)
    assert memo.rows(images, "a", total).flatten().tolist() == [4.0, 4.0, 4.0]
    assert memo.rows(images[1:], "a", total).flatten().tolist() == [4.0, 4.0]
    assert memo.rows(images.flip(2)[:1], "a", total).tolist() == [[4.0]]
    assert calls == [3, 1]
    images[0] = 2.0
    assert memo.rows(images, "a", total).flatten().tolist() == [8.0, 4.0, 4.0]
    assert calls == [3, 1, 3]
    # The same memory seen as images of another shape holds other images.
    assert memo.rows(images.view(6, 1, 1, 2), "a", total).flatten()[0] == 4.0
    del images
    assert not memo._rows


def test_nothing_is_remembered_of_images_that_do_not_tell_when_they_change() -> None:
    memo = ImageMemo()
    with torch.inference_mode():
        images = torch.ones(2, 1, 2, 2)
        for value in (1.0, 2.0):
            images.fill_(value)
            rows = memo.rows(images, "a", lambda x, _: x.flatten(1).sum(1))
            assert rows.tolist() == [4.0 * value] * 2


def test_a_residence_freezes_what_it_holds() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    Residence(network, torch.device("cpu"))
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_rows_that_depend_on_a_text_are_remembered_with_it() -> None:
    memo = ImageMemo()
    asked: list[list[int]] = []

    def lengths(images: Tensor, rows: list[int]) -> Tensor:
        asked.append(rows)
        return torch.arange(len(images)).float()

    images = torch.rand(3, 1, 2, 2)
    first = memo.rows(images, "a", lengths, texts=["x", "y", "z"])
    assert first.tolist() == [0.0, 1.0, 2.0]
    assert memo.rows(images, "a", lengths, texts=["x", "b", "z"]).tolist() == [0.0, 0.0, 2.0]
    assert asked == [[0, 1, 2], [1]]


@pytest.mark.gpu
def test_weights_rest_in_pinned_memory_and_work_on_the_gpu() -> None:
    device = torch.device("cuda")
    network = nn.Linear(64, 64)
    wanted = network.weight.detach().clone()
    residence = Residence(network, device, offload=True)
    for _ in range(2):
        assert network.weight.device.type == "cpu" and network.weight.is_pinned()
        before = torch.cuda.memory_allocated(device)
        residence.wake()
        assert network.weight.device.type == "cuda"
        assert torch.equal(network.weight.cpu(), wanted)
        residence.rest()
        assert torch.cuda.memory_allocated(device) == before


@pytest.mark.gpu
def test_a_judge_tells_the_memory_in_use_while_it_worked() -> None:
    class Hungry:
        name = "hungry"

        def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
            return images.new_zeros(len(images), 2**20).sum(dim=1)

    images = torch.rand(4, 3, 8, 8, device="cuda")
    lane = LocalLane(Hungry(), 4, no_ranges)
    lane.take(images, [Prompt("a")] * 4)
    assert lane.outcome().metrics()["peak_bytes"] >= 4 * 2**20 * 4


def test_on_a_cpu_no_memory_is_told() -> None:
    lane = LocalLane(MseReward(), 1, no_ranges)
    lane.take(torch.rand(1, 3, 8, 8), [Prompt("a")])
    assert "peak_bytes" not in lane.outcome().metrics()
