"""What is remembered of images, and frozen networks."""

import torch
from torch import Tensor, nn

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
