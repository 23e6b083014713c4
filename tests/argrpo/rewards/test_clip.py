"""The CLIP judges against open_clip's own calls, on a small tower with random weights."""

import json

import open_clip
import pytest
import torch
from torch.nn import functional as F

from argrpo.data import Prompt
from argrpo.rewards.clip import ClipReward, Hpsv2Reward, TowerPixels, preprocess

_CPU = torch.device("cpu")
_TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tower")
    (folder / "argrpo-tiny.json").write_text(json.dumps(_TINY))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("argrpo-tiny")
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt", model.eval()


def test_score_is_the_cosine_of_the_library(checkpoint) -> None:
    path, model = checkpoint
    reward = ClipReward("argrpo-tiny", str(path), device=_CPU, reward_batch=2)
    images = torch.rand(5, 3, 48, 48)
    texts = ["a cat", "a dog", "a cat", "a hat", "a cat"]
    scores = reward(images, [Prompt(text) for text in texts])
    with torch.no_grad():
        pixels = preprocess(images, TowerPixels.of(model))
        image = F.normalize(model.encode_image(pixels), dim=1)
        text = F.normalize(model.encode_text(open_clip.get_tokenizer("argrpo-tiny")(texts)), dim=1)
    # fp32 sums of 32 products in another order
    torch.testing.assert_close(scores, (image * text).sum(dim=1), atol=1e-5, rtol=0)


def test_a_text_is_embedded_once(checkpoint, monkeypatch) -> None:
    path, _ = checkpoint
    reward = ClipReward("argrpo-tiny", str(path), device=_CPU)
    seen: list[int] = []
    encode = reward._model.encode_text
    monkeypatch.setattr(reward._model, "encode_text", lambda t: (seen.append(len(t)), encode(t))[1])
    prompts = [Prompt("a cat"), Prompt("a dog"), Prompt("a cat")]
    first = reward(torch.rand(3, 3, 32, 32), prompts)
    reward(torch.rand(3, 3, 32, 32), prompts)
    assert seen == [2]
    assert first.shape == (3,)


def test_pixels_follow_the_picture_route_within_a_grey_level(checkpoint) -> None:
    _, model = checkpoint
    from torchvision.transforms.functional import to_pil_image

    # Middle greys: a picture clips what bicubic weights push beyond white and black, floats do not.
    image = torch.randint(96, 160, (3, 80, 60), dtype=torch.uint8)
    ours = preprocess(image[None].float() / 255, TowerPixels.of(model))[0]
    theirs = open_clip.image_transform(32, is_train=False)(to_pil_image(image))
    # The picture route rounds to 8 bits after each of two passes: a level, over the tower's std.
    assert (ours - theirs).abs().max() < 1.0 / 255 / 0.26


def test_unknown_architecture_weights_and_checkpoint_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="model: expected an open_clip architecture, got 'ViT-Z'"):
        ClipReward("ViT-Z", device=_CPU)
    with pytest.raises(ValueError, match=r"pretrained: expected a file or one of .*openai"):
        ClipReward(pretrained=str(tmp_path / "none.pt"), device=_CPU)
    with pytest.raises(FileNotFoundError, match=r"HPS_v2\.1_compressed\.pt .*xswu/HPSv2"):
        Hpsv2Reward(str(tmp_path / "none.pt"), device=_CPU)
