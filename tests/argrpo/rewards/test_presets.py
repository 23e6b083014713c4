"""The judges of the shipped recipes: what can be known of them without their weights."""

from dataclasses import asdict
from typing import Any

import open_clip
import pytest
import torch

from argrpo.config import RewardConfig, TrainConfig
from argrpo.config_files import parse_config
from argrpo.data import Prompt
from argrpo.rewards import registry
from argrpo.rewards.registry import REWARDS, make_reward
from argrpo.rewards.scoring import Judges

_CPU = torch.device("cpu")
_ARGRPO = ["argrpo_c2i_xl_384", "argrpo_t2i_xl_256"]


def _config(preset: str) -> TrainConfig:
    return parse_config(TrainConfig, ["--config", preset], command="", lists={})


_JUDGES = [(p, r) for p in (*_ARGRPO, "t2i_xl_256", "loofid_c2i_l_256") for r in _config(p).rewards]
_SAID = {  # of what has to be fetched
    "hpsv2": r"options\.checkpoint: .*HPS_v2\.1_compressed\.pt \(published in xswu/HPSv2\)",
    "maniqa": r"options\.weights: .*ckpt_koniq10k\.pt \(published in IIGROUP/MANIQA",
    "qwen_vl": r"options\.folder: .*published in Qwen/Qwen2\.5-VL-3B-Instruct\)",
    "loo_fid": r"options\.features_path: .*inception_v3 .*published as Inception_V3_Weights",
}


@pytest.mark.parametrize(("preset", "reward"), _JUDGES, ids=lambda x: getattr(x, "name", x))
def test_a_missing_file_is_named_and_nothing_else_is_wrong(
    preset: str, reward: RewardConfig, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kind = reward.name.removeprefix("quantize(").removesuffix(")")
    if kind == "clip":  # by a tag, which may have been fetched
        wanted = reward.options["model"], reward.options["pretrained"]
        assert wanted in open_clip.list_pretrained()
        return
    with pytest.raises(FileNotFoundError, match=rf"rewards\.\w+\.{_SAID[kind]}"):
        make_reward(reward, _CPU, None)


class _Fixed:
    """A judge that says one number."""

    def __init__(self, score: float, name: str) -> None:
        self.name = name
        self._score = score

    def __call__(self, images: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        return torch.full((len(prompts),), self._score)


@pytest.mark.parametrize("preset", _ARGRPO)
def test_the_eight_rewards_of_ar_grpo_add_up_as_released(preset: str, monkeypatch) -> None:
    """One image with raw scores as they are typical, by the formulas of img_gen_grpo_rewards.py."""
    raw = {"clip": 0.31, "hpsv2": 0.28, "maniqa": 0.5}
    answers = {"rubric_described": 3.5, "fake": 1.0, "weird": 0.0}

    def stand_in(kind: str):
        def clip(model: str, pretrained: str) -> _Fixed:
            return _Fixed(raw["clip"], "clip")

        def hpsv2(checkpoint: str) -> _Fixed:
            return _Fixed(raw["hpsv2"], "hpsv2")

        def maniqa(weights: str, crops: str, num_crops: int) -> _Fixed:
            assert (crops, num_crops) == ("random", 20)
            return _Fixed(raw["maniqa"], "maniqa")

        def qwen_vl(folder: str, question: str, read: str, max_new_tokens: int = 256) -> _Fixed:
            assert (read, max_new_tokens) == ("answer", 256)
            return _Fixed(answers[question], f"qwen_vl_{question}")

        return {"clip": clip, "hpsv2": hpsv2, "maniqa": maniqa, "qwen_vl": qwen_vl}[kind]

    monkeypatch.setattr(registry, "_load", stand_in)
    judges = Judges(_config(preset), _CPU)
    scores = judges.score(torch.rand(1, 3, 4, 4), [Prompt("a")], with_monitors=False)
    judges.close()
    clip, hps = 5 * raw["clip"] + 1.0, 5 * raw["hpsv2"] + 0.5  # steps: .31 is past .3, .28 is not
    total = clip + hps + 2 * raw["maniqa"] + (3.5 + 1.0 + 0.0) / 4
    assert len(scores.names) == 8
    assert scores.metrics()["reward"] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("name", REWARDS)
def test_every_registered_judge_can_be_imported(name: str) -> None:
    assert callable(registry._load(name))


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, item in value.items() for k, v in _leaves(item, f"{name}.{key}").items()}


def test_taming_takes_the_recipe_of_llamagen_but_for_the_model_and_its_draws() -> None:
    ours, theirs = (_leaves(asdict(_config(f"loofid_{n}"))) for n in ("taming_256", "c2i_l_256"))
    differing = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
    assert differing == {
        ".output_dir",
        ".policy.path",
        ".policy.image_size",
        ".tokenizer.path",
        ".rewards.2.options.initial",
        ".rewards.2.options.parity_bootstrap",  # false, and left at its default of false
        ".rollout.guidance_scale",
        ".rollout.top_k",
        ".rollout.top_p",
        ".objective.policy",
    }
