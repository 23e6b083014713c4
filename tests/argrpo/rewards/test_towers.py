"""Towers: what is loaded and computed once, where weights stand, and which files are refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from argrpo.config import PolicyConfig, RewardConfig, TokenizerConfig, TrainConfig
from argrpo.data import Prompt
from argrpo.rewards.aesthetic import AestheticReward
from argrpo.rewards.clip import ClipReward, Hpsv2Reward, PickScoreReward
from argrpo.rewards.scoring import Judges
from argrpo.rewards.sharing import SharedNetworks

_CPU = torch.device("cpu")


def _prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text) for text in texts]


def _count_images(model: nn.Module, monkeypatch) -> list[int]:
    seen: list[int] = []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda p: (seen.append(len(p)), encode(p))[1])
    return seen


def test_a_folder_of_open_clip_is_loaded_without_a_network(tower_files, tmp_path) -> None:
    from safetensors.torch import save_file

    path, model = tower_files
    config = json.loads((Path(path).parent / "argrpo-tiny.json").read_text())
    described = {
        "model_cfg": config,
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    judge = ClipReward(f"local-dir:{tmp_path}", device=_CPU)
    assert judge._pixels.mean == (0.5, 0.5, 0.5)
    assert judge(torch.rand(1, 3, 32, 32), _prompts("a cat")).isfinite().all()
    described["preprocess_cfg"] = {"resize_mode": "longest"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"options\.model: .* by the shortest .* got .*longest"):
        ClipReward(f"local-dir:{tmp_path}", device=_CPU)
    # Without them the library would give random ones.
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"options\.model: .*weights .*could not be loaded"):
        ClipReward(f"local-dir:{tmp_path}", device=_CPU)


def test_judges_of_one_tower_load_it_once_and_embed_an_image_once(tower_files, monkeypatch) -> None:
    path, _ = tower_files
    shared = SharedNetworks()
    options = {"device": _CPU, "shared": shared, "reward_batch": 4}
    first = ClipReward("argrpo-tiny", path, **options)
    second = ClipReward("argrpo-tiny", path, name="again", **options)
    assert first._tower is second._tower
    seen = _count_images(first._tower._network.module, monkeypatch)
    images = torch.rand(6, 3, 32, 32)
    scores = first(images, _prompts(*"abcde", "a")), second(images, _prompts(*"abcde", "a"))
    assert seen == [4, 2]
    assert torch.equal(*scores)
    # The parts of a batch are those images, too; others are not.
    second(images[2:4], _prompts("a", "a"))
    assert seen == [4, 2]
    second(images[2:4].clone(), _prompts("a", "a"))
    assert seen == [4, 2, 2]


def test_a_judge_with_another_batch_or_other_pixels_computes_its_own(
    tower_files, monkeypatch
) -> None:
    path, _ = tower_files
    shared = SharedNetworks()
    judges = [
        ClipReward("argrpo-tiny", path, device=_CPU, shared=shared, **options)
        for options in ({}, {"reward_batch": 2}, {"antialias": False})
    ]
    seen = _count_images(judges[0]._tower._network.module, monkeypatch)
    images = torch.rand(3, 3, 48, 48)
    for judge in judges:
        judge(images, _prompts("a", "a", "a"))
    assert seen == [3, 2, 1, 3]


def test_offloaded_weights_are_on_the_device_only_while_they_work(tower_files) -> None:
    path, _ = tower_files
    kept = ClipReward("argrpo-tiny", path, device=_CPU)
    judge = ClipReward("argrpo-tiny", path, device=_CPU, offload=True)
    weight = next(judge._tower._network.module.parameters())
    home = weight.data_ptr()
    images = torch.rand(2, 3, 32, 32)
    for _ in range(2):
        scores = judge(images.clone(), _prompts("a cat", "a dog"))
        # A library's product may sum in another order where weights lie at other addresses.
        wanted = kept(images, _prompts("a cat", "a dog"))
        torch.testing.assert_close(scores, wanted, atol=1e-6, rtol=0)
        assert weight.data_ptr() != home  # a copy, on a GPU in its memory
        judge.rest()
        assert weight.data_ptr() == home
    kept.rest()


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("this would have run",))


def test_files_of_something_else_are_refused_by_option(
    tower_files, clip_folder, tmp_path, capsys
) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(_Code()))
    for name in ("other.pt", "code.pt"):
        with pytest.raises(ValueError, match=r"rewards\.hpsv2\.options\.pretrained: expected"):
            Hpsv2Reward(str(tmp_path / name), model="argrpo-tiny", device=_CPU)
    assert "this would have run" not in capsys.readouterr().out
    torch.save({"layers.0.weight": torch.zeros(1)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"rewards\.aesthetic\.options\.head: expected the keys"):
        AestheticReward(str(tmp_path / "head.pth"), device=_CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "ViT-Z"}, r"rewards\.clip\.options\.model: expected an open_clip architecture"),
        ({"pretrained": "none.pt"}, r"options\.pretrained: expected a file or one of .*openai"),
        ({"dtype": "float8"}, r"options\.dtype: expected one of float32, bfloat16, got 'float8'"),
        ({"model": "local-dir:/none"}, r"options\.model: expected towers that can be loaded"),
        ({"model": "local-dir:/none", "pretrained": "a"}, "pretrained: expected none beside"),
    ],
)
def test_options_that_name_no_tower_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipReward(**options, device=_CPU)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Hpsv2Reward(p, device=_CPU), r"HPS_v2\.1_compressed\.pt .*xswu/HPSv2"),
        (lambda p: PickScoreReward(p, device=_CPU), "yuvalkirstain/PickScore_v1"),
        (lambda p: AestheticReward(p, device=_CPU), "improved-aesthetic-predictor"),
    ],
)
def test_a_missing_file_is_named_with_where_it_is_published(tmp_path, make, message) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{message}.*{tmp_path}"):
        make(str(tmp_path / "none"))


def test_a_folder_without_its_files_is_named(clip_folder, tmp_path) -> None:
    folder, model = clip_folder
    with pytest.raises(FileNotFoundError, match=r"folder|model: .*without config\.json"):
        ClipReward(str(tmp_path), device=_CPU)
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer: expected tokenizer\.json"):
        ClipReward(str(tmp_path), device=_CPU)
    judge = ClipReward(str(tmp_path), tokenizer=str(folder), device=_CPU)
    assert judge(torch.rand(1, 3, 32, 32), _prompts("a cat")).isfinite().all()
    weights = tmp_path / "model.safetensors"
    from safetensors.torch import load_file, save_file

    kept = {k: v for k, v in load_file(weights).items() if "text_projection" not in k}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"without text_projection"):
        ClipReward(str(tmp_path), tokenizer=str(folder), device=_CPU)


def test_a_run_embeds_an_image_once_for_a_judge_and_its_steps(tower_files) -> None:
    options = {"model": "argrpo-tiny", "pretrained": tower_files[0], "reward_batch": 4}
    steps = {"thresholds": [0.0], "values": [-1.0, 1.0]}
    config = TrainConfig(
        output_dir="unused",
        policy=PolicyConfig(path="unused"),
        tokenizer=TokenizerConfig(path="unused"),
        rewards=[
            RewardConfig(name="quantize(clip)", options={**options, **steps}),
            RewardConfig(name="clip", options=options),
        ],
        monitors=[RewardConfig(name="clip", options={**options, "name": "watched"})],
    )
    judges = Judges(config, _CPU)
    seen: list[int] = []
    tower = judges._rewards[1]._tower._network.module
    tower.visual.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    scores = judges.score(torch.rand(6, 3, 32, 32), _prompts(*"abcabc"), with_monitors=True)
    judges.close()
    assert seen == [4, 2]
    assert torch.equal(scores.values[:, 0], scores.values[:, 1].sign())
    assert torch.equal(scores.monitored[:, 0], scores.values[:, 1])
