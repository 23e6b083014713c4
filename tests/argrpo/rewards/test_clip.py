"""The judges by cosine against the libraries' own numbers, on small towers with random weights."""

from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn import functional as F

from argrpo.data import Prompt
from argrpo.rewards.clip import ClipReward, Hpsv2Reward, PickScoreReward
from argrpo.rewards.tower_networks import pooled
from argrpo.rewards.tower_pixels import TowerPixels, preprocess

_TEXTS = ["a cat", "a dog", "a cat", "a hat", "a cat"]
_CPU = torch.device("cpu")


def _prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text) for text in texts]


def test_score_is_the_cosine_of_the_library(tower_files) -> None:
    path, model = tower_files
    reward = ClipReward("argrpo-tiny", str(path), device=_CPU, reward_batch=2)
    images = torch.rand(5, 3, 48, 48)
    texts = ["a cat", "a dog", "a cat", "a hat", "a cat"]
    scores = reward(images, [Prompt(text) for text in texts])
    with torch.no_grad():
        pixels = preprocess(images, TowerPixels(32))
        image = F.normalize(model.encode_image(pixels), dim=1)
        text = F.normalize(model.encode_text(open_clip.get_tokenizer("argrpo-tiny")(texts)), dim=1)
    # fp32 sums of 32 products in another order
    torch.testing.assert_close(scores, (image * text).sum(dim=1), atol=1e-5, rtol=0)


def test_a_text_is_embedded_once(tower_files, monkeypatch) -> None:
    path, _ = tower_files
    reward = ClipReward("argrpo-tiny", str(path), device=_CPU)
    seen: list[int] = []
    encode = reward._tower._network.module.encode_text
    monkeypatch.setattr(
        reward._tower._network.module, "encode_text", lambda t: (seen.append(len(t)), encode(t))[1]
    )
    prompts = [Prompt("a cat"), Prompt("a dog"), Prompt("a cat")]
    first = reward(torch.rand(3, 3, 32, 32), prompts)
    reward(torch.rand(3, 3, 32, 32), prompts)
    assert seen == [2]
    assert first.shape == (3,)


def test_a_clip_of_transformers_gives_the_cosine_of_the_library(clip_folder) -> None:
    from transformers import AutoTokenizer

    folder, model = clip_folder
    judge = ClipReward(str(folder), device=_CPU, reward_batch=2)
    images = torch.randint(256, (5, 3, 32, 32)) / 255  # as of a file
    scores = judge(images, _prompts(*_TEXTS))
    pixels = (images - torch.tensor(judge._pixels.mean).view(3, 1, 1)) / torch.tensor(
        judge._pixels.std
    ).view(3, 1, 1)
    tokens = AutoTokenizer.from_pretrained(folder)(_TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        # The library's own number: logits_per_image over the learned scale.
        logits = model(**tokens, pixel_values=pixels).logits_per_image.diagonal()
    # fp32 sums of 24 products in another order
    torch.testing.assert_close(scores, logits / model.logit_scale.exp(), atol=1e-5, rtol=0)


def test_the_embeddings_of_transformers_4_and_5_are_read(clip_folder, monkeypatch) -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    embedded = torch.rand(2, 24)
    assert pooled(embedded) is embedded
    assert pooled(BaseModelOutputWithPooling(pooler_output=embedded)) is embedded
    folder, _ = clip_folder
    judge = ClipReward(str(folder), device=_CPU)
    images = torch.rand(2, 3, 32, 32)
    new = judge(images, _prompts("a cat", "a dog"))
    module = judge._tower._network.module
    for name in ("get_image_features", "get_text_features"):
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda call=call, **kw: call(**kw).pooler_output)
    judge._tower._texts.clear()
    old = judge(images.clone(), _prompts("a cat", "a dog"))
    torch.testing.assert_close(old, new, atol=1e-6, rtol=0)


def test_bfloat16_towers_score_in_fp32_near_the_others(tower_files) -> None:
    path, _ = tower_files
    images, prompts = torch.rand(4, 3, 32, 32), _prompts("a", "b", "c", "d")
    wide = ClipReward("argrpo-tiny", path, device=_CPU)(images, prompts)
    narrow = ClipReward("argrpo-tiny", path, device=_CPU, dtype="bfloat16")(images, prompts)
    assert narrow.dtype == torch.float32
    # Two layers of bf16, each good to 2^-8 of its values, under a cosine of at most 1.
    torch.testing.assert_close(narrow, wide, atol=2e-2, rtol=0)
    assert not torch.equal(narrow, wide)


def test_hpsv2_reads_the_wrapping_of_its_checkpoint(tower_files, tmp_path) -> None:
    _, model = tower_files
    wrapped = {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}
    torch.save({**wrapped, "epoch": 3}, tmp_path / "hps.pt")
    images, prompts = torch.rand(2, 3, 48, 48), _prompts("a cat", "a dog")
    judge = Hpsv2Reward(str(tmp_path / "hps.pt"), model="argrpo-tiny", device=_CPU)
    # What its fork sees of an image: a tensor from end to end.
    pixels = preprocess(images, TowerPixels(32, resized_as="tensor"))
    with torch.no_grad():
        image = F.normalize(model.encode_image(pixels), dim=1)
    text = judge._tower.texts(["a cat", "a dog"], 2)
    # A library's product may sum in another order where weights lie at other addresses.
    wanted = (image * text).sum(dim=1)
    torch.testing.assert_close(judge(images, prompts), wanted, atol=1e-6, rtol=0)


def test_a_tower_sees_pictures_unless_its_recipe_resizes_tensors(tower_files) -> None:
    images, prompts = torch.rand(2, 3, 48, 48), _prompts("a cat", "a dog")
    picture = ClipReward("argrpo-tiny", tower_files[0], device=_CPU)
    levels = (images * 255).round() / 255
    # What 8 bits cut off is no part of a picture, and is of a tensor.
    torch.testing.assert_close(picture(images, prompts), picture(levels, prompts))
    tensor = ClipReward("argrpo-tiny", tower_files[0], antialias=False, device=_CPU)
    assert not torch.equal(tensor(images, prompts), tensor(levels, prompts))


def test_pickscore_is_the_scaled_cosine(clip_folder) -> None:
    folder, model = clip_folder
    images, prompts = torch.rand(2, 3, 32, 32), _prompts("a cat", "a dog")
    scores = PickScoreReward(str(folder), device=_CPU, reward_batch=64)(images, prompts)
    cosines = ClipReward(str(folder), device=_CPU)(images, prompts)
    torch.testing.assert_close(scores, cosines * model.logit_scale.exp())


def test_an_unknown_interpolation_is_refused(tower_files) -> None:
    with pytest.raises(ValueError, match=r"interpolation: expected one of bicubic, bilinear"):
        ClipReward("argrpo-tiny", tower_files[0], interpolation="nearest", device=_CPU)


def test_hpsv2_gives_the_number_of_its_package(tower_files, tmp_path) -> None:
    """Where it can be installed: see `hpsv2` in CONTRIBUTING's dependencies."""
    pytest.importorskip("hpsv2.src.open_clip", reason="hpsv2 wants an environment of its own")
    from hpsv2 import img_score
    from hpsv2.src import open_clip as fork
    from torchvision.transforms.functional import to_pil_image

    path, model = tower_files
    torch.save({"state_dict": model.state_dict()}, tmp_path / "hps.pt")
    fork.add_model_config(Path(path).parent)
    theirs, _, pixels = fork.create_model_and_transforms(
        "argrpo-tiny", precision="fp32", output_dict=True
    )
    img_score.model_dict.update(model=theirs, preprocess_val=pixels)
    images = torch.randint(256, (3, 3, 48, 40), dtype=torch.uint8)
    texts = ["a cat", "a dog", "a cat"]
    wanted = [
        img_score.score(to_pil_image(image), text, cp=str(tmp_path / "hps.pt"))[0]
        for image, text in zip(images, texts, strict=True)
    ]
    judge = Hpsv2Reward(str(tmp_path / "hps.pt"), model="argrpo-tiny", device=_CPU)
    # fp32 sums in another order, of a batch and of one image
    torch.testing.assert_close(
        judge(images / 255, _prompts(*texts)), torch.tensor(wanted), atol=1e-5, rtol=0
    )
