"""The aesthetic score against the layers of the published head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argrpo.data import Prompt
from argrpo.rewards.aesthetic import AestheticReward, folded
from argrpo.rewards.clip import ClipReward
from argrpo.rewards.sharing import SharedNetworks

_CPU = torch.device("cpu")


def _prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text) for text in texts]


def _count_images(model: nn.Module, monkeypatch) -> list[int]:
    seen: list[int] = []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda p: (seen.append(len(p)), encode(p))[1])
    return seen


class _PublishedHead(nn.Module):
    """The layout of the published file, on 32 features."""

    def __init__(self) -> None:
        super().__init__()
        linear, drop = nn.Linear, nn.Dropout
        self.layers = nn.Sequential(
            *(linear(32, 24), drop(0.2), linear(24, 16), drop(0.2), linear(16, 8), drop(0.1)),
            *(linear(8, 4), linear(4, 1)),
        )


def test_the_aesthetic_score_is_that_of_its_layers_on_a_shared_tower(
    tower_files, tmp_path, monkeypatch
) -> None:
    path, model = tower_files
    head = _PublishedHead().eval()
    torch.save(head.state_dict(), tmp_path / "head.pth")
    shared = SharedNetworks()
    options = {"device": _CPU, "shared": shared}
    clip = ClipReward("argrpo-tiny", path, **options)
    file = str(tmp_path / "head.pth")
    judge = AestheticReward(file, path, model="argrpo-tiny", **options)
    seen = _count_images(clip._tower._network.module, monkeypatch)
    images = torch.randint(256, (3, 3, 32, 32)) / 255  # as of a file
    clip(images, _prompts("a", "b", "c"))
    scores = judge(images, _prompts("a", "b", "c"))
    assert seen == [3]
    with torch.no_grad():
        unit = F.normalize(model.encode_image(_normalised(images, clip)), dim=1)
        wanted = head.layers(unit).squeeze(1)
    # fp32: five layers in a row against one
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=1e-5)


def _normalised(images: Tensor, judge: ClipReward) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (judge._pixels.mean, judge._pixels.std))
    return (images - mean) / std


def test_layers_fold_to_one() -> None:
    layers = [(torch.randn(3, 5), torch.randn(3)), (torch.randn(1, 3), torch.randn(1))]
    weight, bias = folded(layers)
    x = torch.randn(5)
    wanted = layers[1][0] @ (layers[0][0] @ x + layers[0][1]) + layers[1][1]
    torch.testing.assert_close((weight.float() @ x + bias.float())[None], wanted)
