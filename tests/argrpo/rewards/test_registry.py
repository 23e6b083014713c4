"""Judges by name."""

import sys

import pytest
import torch
from torch import Tensor

from argrpo.config import RewardConfig
from argrpo.data import Prompt
from argrpo.rewards.registry import make_reward
from argrpo.rewards.sharing import SharedNetworks

_CPU = torch.device("cpu")


def number_of_letters(images: Tensor, prompts: list[Prompt]) -> list[float]:
    return [float(len(prompt.text)) for prompt in prompts]


class Constant:
    name = "constant"

    def __init__(self, value: float, *, device: torch.device) -> None:
        self.value = torch.tensor(value, device=device)

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        return self.value.expand(len(prompts))


class InStretches(Constant):
    def __init__(self, reward_batch: int) -> None:
        self.reward_batch = reward_batch


def _make(name: str, /, **options: object):
    return make_reward(RewardConfig(name=name, options=options), _CPU, None)


def test_a_function_of_your_own_is_a_judge() -> None:
    reward = _make(f"{__name__}:number_of_letters")
    scores = reward(torch.rand(2, 3, 8, 8), [Prompt("a cat"), Prompt("a")])
    assert scores.tolist() == [5.0, 1.0]
    assert scores.dtype == torch.float32


def test_a_class_of_your_own_is_built_with_its_options_and_the_device() -> None:
    reward = _make(f"{__name__}:Constant", value=3.0)
    assert reward(torch.rand(1, 3, 8, 8), [Prompt("a")]).tolist() == [3.0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clipp", {}, r"rewards\.name: expected one of .*clip.* or module:function, got 'clipp'"),
        ("no_such_module:f", {}, r"rewards\.name: cannot load 'no_such_module:f'"),
        ("math:no_such_function", {}, r"cannot load 'math:no_such_function'"),
        (":f", {}, r"rewards\.name: cannot load ':f': Empty module name"),
        ("math:pi", {}, r"rewards\.name: expected a function or a class, got math:pi = 3\.14"),
        (f"{__name__}:number_of_letters", {"a": 1}, "expected none for a function, got a"),
        (f"{__name__}:Constant", {}, r"options: expected value, got none"),
        (f"{__name__}:Constant", {"value": 1, "valeu": 2}, "expected some of value, device, got"),
        (f"{__name__}:InStretches", {"reward_batch": 0}, r"options\.reward_batch: .* 1, got 0"),
    ],
)
def test_a_judge_that_cannot_be_made_is_named(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _make(name, **options)


def test_nothing_heavy_is_imported_before_it_is_asked_for() -> None:
    import subprocess

    heavy = ["open_clip", "transformers", "pyiqa", "timm", "lpips", "torchvision", "httpx"]
    code = f"import argrpo.rewards.registry, sys; print(*[m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


_STEPS = {"thresholds": [0.0, 0.3], "values": [-1.0, 0.5, 1.0]}


def test_a_quantized_judge_shares_the_tower_of_the_judge_that_it_quantizes(tower_files) -> None:
    path, _ = tower_files
    options = {"model": "argrpo-tiny", "pretrained": path}
    shared = SharedNetworks()
    clip = make_reward(RewardConfig(name="clip", options=options), _CPU, None, shared)
    stepped = RewardConfig(name="quantize(clip)", options={**options, **_STEPS})
    quantized = make_reward(stepped, _CPU, None, shared)
    assert quantized.name == "clip_quantized"
    seen: list[int] = []
    clip._tower._network.module.visual.register_forward_hook(lambda *_: seen.append(1))
    images, prompts = torch.rand(3, 3, 32, 32), [Prompt("a"), Prompt("b"), Prompt("c")]
    scores = clip(images, prompts)
    values = quantized(images, prompts)
    assert seen == [1]
    assert values.tolist() == [-1.0 if score < 0 else 0.5 for score in scores]


def test_a_quantized_judge_is_named_as_told_and_its_options_are_checked() -> None:
    inner = f"quantize({__name__}:Constant)"
    assert _make(inner, value=0.1, name="steps", **_STEPS).name == "steps"
    with pytest.raises(ValueError, match=r"options\.thresholds: expected thresholds and values"):
        _make(inner, value=0.1, thresholds=[0.0])
    with pytest.raises(ValueError, match="options: expected value, got none"):
        _make(inner, **_STEPS)
    with pytest.raises(ValueError, match=r"rewards\.name: expected one of"):
        _make("quantize(clipp)", **_STEPS)
