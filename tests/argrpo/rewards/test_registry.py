"""Judges by name."""

import sys

import pytest
import torch
from torch import Tensor

from argrpo.config import RewardConfig
from argrpo.data import Prompt
from argrpo.rewards.registry import make_reward

_CPU = torch.device("cpu")


def number_of_letters(images: Tensor, prompts: list[Prompt]) -> list[float]:
    return [float(len(prompt.text)) for prompt in prompts]


class Constant:
    name = "constant"

    def __init__(self, value: float, *, device: torch.device) -> None:
        self.value = torch.tensor(value, device=device)

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        return self.value.expand(len(prompts))


def _make(name: str, **options: object):
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
        (f"{__name__}:number_of_letters", {"a": 1}, "expected none for a function, got a"),
        (f"{__name__}:Constant", {}, r"options: expected value, got none"),
        (f"{__name__}:Constant", {"value": 1, "valeu": 2}, "expected some of value, device, got"),
    ],
)
def test_a_judge_that_cannot_be_made_is_named(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _make(name, **options)


def test_nothing_heavy_is_imported_before_it_is_asked_for() -> None:
    import subprocess

    code = "import argrpo.rewards.registry, sys; print('open_clip' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
