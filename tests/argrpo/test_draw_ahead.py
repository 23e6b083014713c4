"""Drawing the next step's images before this step's are scored."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from argrpo.collection import Collected, Collection
from argrpo.config import TrainConfig
from argrpo.data import Prompt
from argrpo.data_config import DataConfig
from argrpo.engine.sampling_params import SamplingParams
from argrpo.learner import Learner
from argrpo.model_config import PolicyConfig, TokenizerConfig
from argrpo.objective_config import ObjectiveConfig
from argrpo.optimizer_config import OptimizerConfig
from argrpo.output_config import OutputConfig
from argrpo.reward_config import RewardConfig
from argrpo.schedules import LearningRateConfig
from argrpo.trainer import Trainer

STEPS = 3
DRAWN: set[int] = set()  # steps, for the judge below


def brighter_left(images: Tensor, prompts: list[Prompt]) -> Tensor:
    left, right = images.chunk(2, dim=3)
    return (left.mean(dim=(1, 2, 3)) - right.mean(dim=(1, 2, 3))) * 100


async def when_the_next_is_drawn(completions: Any, trainer_state: Any, log_metric: Any) -> list:
    log_metric("of_step", trainer_state.global_step)
    async with asyncio.timeout(30):
        while trainer_state.global_step < STEPS and trainer_state.global_step not in DRAWN:
            await asyncio.sleep(0.001)
    return [float(picture.getpixel((0, 0))[0]) for picture in completions]


def _config(models: Path, folder: Path, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "rewards": [RewardConfig(name=f"{__name__}:brighter_left")],
        "rollout": SamplingParams(guidance_scale=2.0),
    }
    return TrainConfig(
        output_dir=str(folder),
        policy=PolicyConfig(path=str(models / "policy"), num_heads=2),
        tokenizer=TokenizerConfig(path=str(models / "tokenizer")),
        data=DataConfig(names="digits"),
        prompts_per_step=4,
        images_per_prompt=4,
        num_steps=STEPS,
        # Large, so that images of two policies differ in this few steps.
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=0.05)),
        output=OutputConfig(sample_every=0, sample_images=2, save_every=0, trackers=[]),
        device="cpu",
        **{**defaults, **settings},
    )


class Watched:
    """What a run collects and learns, in its order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.tokens: list[Tensor] = []  # [N, T] of each step
        self.weights: list[Tensor] = []  # of the head, before each step learns
        self.old: list[Tensor | None] = []
        self.on_collected: Callable[[int], None] = lambda step: None
        collect, learn = Collection.collect, Learner.learn

        def collected(own: Collection, step: int, **options: Any) -> Collected:
            self.events.append(f"draw {step}")
            found = collect(own, step, **options)
            self.tokens.append(found.rollout.token_ids)
            self.on_collected(step)
            return found

        def learned(own: Learner, experience: Any, step: int, **options: Any) -> dict[str, float]:
            self.events.append(f"learn {step}")
            self.old.append(experience.old_logprobs)
            self.weights.append(own._policy.head_weight.detach().clone())
            return learn(own, experience, step, **options)

        monkeypatch.setattr(Collection, "collect", collected)
        monkeypatch.setattr(Learner, "learn", learned)


def _rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_is_drawn_before_the_one_before_it_is_learned(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Watched(monkeypatch)
    Trainer(_config(tiny_models, tmp_path, draw_ahead=True)).train()
    assert seen.events == ["draw 0", "draw 1", "learn 0", "draw 2", "learn 1", "learn 2"]


def test_images_come_from_the_policy_of_the_step_before(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Watched(monkeypatch)
    Trainer(_config(tiny_models, tmp_path / "ahead", draw_ahead=True)).train()
    tokens = list(seen.tokens)
    still = Trainer(_config(tiny_models, tmp_path / "still"))
    still._clock.start_step()
    of_base = [
        still._collection.collect(step, with_monitors=False, support=False) for step in (0, 1)
    ]
    assert [torch.equal(a, b.rollout.token_ids) for a, b in zip(tokens, of_base, strict=False)] == [
        True,
        True,
    ]
    # Where nothing is drawn ahead, the second step has other images.
    seen.tokens.clear()
    Trainer(_config(tiny_models, tmp_path / "apart")).train()
    assert torch.equal(seen.tokens[0], tokens[0]) and not torch.equal(seen.tokens[1], tokens[1])


@pytest.mark.parametrize("old_logprobs", ["recomputed", "draw"])
def test_ratios_compare_with_the_policy_that_drew(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_logprobs: Any
) -> None:
    seen = Watched(monkeypatch)
    objective = ObjectiveConfig(policy="guided", old_logprobs=old_logprobs)
    config = _config(tiny_models, tmp_path / "ahead", draw_ahead=True, objective=objective)
    trainer = Trainer(config)
    base = {name: weight.clone() for name, weight in trainer.policy.state_dict().items()}
    trainer.train()
    still = Trainer(_config(tiny_models, tmp_path / "still", objective=objective))
    assert all(torch.equal(w, base[name]) for name, w in still.policy.state_dict().items())
    still._clock.start_step()
    rollout = still._collection.collect(1, with_monitors=False, support=False).rollout
    assert seen.old[1] is not None
    # Log-probs of about -3 from passes of other shapes, and with "draw" of other code.
    torch.testing.assert_close(seen.old[1], rollout.logprobs, atol=1e-4, rtol=1e-4)
    assert not torch.equal(seen.weights[1], seen.weights[0])  # the policy had moved by then


def test_the_first_step_learns_as_it_does_without(tiny_models: Path, tmp_path: Path) -> None:
    for name, ahead in (("ahead", True), ("apart", False)):
        Trainer(_config(tiny_models, tmp_path / name, draw_ahead=ahead)).train()
    one, other = _rows(tmp_path / "ahead"), _rows(tmp_path / "apart")
    for name in ("reward", "loss", "grad_norm", "entropy/policy"):
        # Ratios are exp(0) of a pass and its own copy, or of two passes that round alike.
        assert one[0][name] == pytest.approx(other[0][name], rel=1e-5, abs=1e-6), name
    assert one[1]["reward"] != other[1]["reward"]


def test_a_judge_may_answer_after_the_next_step_is_drawn(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Watched(monkeypatch)
    DRAWN.clear()
    seen.on_collected = DRAWN.add
    judge = RewardConfig(name=f"{__name__}:when_the_next_is_drawn")
    Trainer(_config(tiny_models, tmp_path, draw_ahead=True, rewards=[judge])).train()
    for step, row in enumerate(_rows(tmp_path), 1):
        assert row[f"rewards/{judge.name}/failures"] == 0
        assert row[f"rewards/{judge.name}/of_step"] == step  # two steps at once, told apart
