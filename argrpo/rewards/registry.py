"""Judges by name. A judge is imported when it is first asked for, never before."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.model_paths import resolve_path
from argrpo.reward_config import RewardConfig
from argrpo.rewards.protocols import DistributionReward, Reward

REWARDS = {
    "digits_judge": "argrpo.digits.judges:DigitJudgeReward",
    "clip": "argrpo.rewards.clip:ClipReward",
    "hpsv2": "argrpo.rewards.clip:Hpsv2Reward",
    "loo_fid": "argrpo.rewards.loo_fid:LooFidReward",
}


def make_reward(
    config: RewardConfig, device: torch.device, cache_dir: str | None
) -> Reward | DistributionReward:
    """The judge that a config names, of one of the two kinds of rewards/protocols.py.

    A name of `REWARDS`, or module:class, is built with the options (and the device, if it takes
    one). module:function is the judge itself, a function of (images, prompts), without options.
    Options that start with digits: stand for files of the embedded task.

    Raises:
        ValueError: no such judge, an option that it does not take, or one that it lacks, named.
    """
    named = _load(config.name)
    if config.name not in REWARDS and not inspect.isclass(named):
        if config.options:
            raise ValueError(
                f"rewards.{config.name}.options: expected none for a function, "
                f"got {', '.join(config.options)}"
            )
        return _FunctionReward(config.name, named)
    options = {key: _resolved(value, cache_dir) for key, value in config.options.items()}
    taken = inspect.signature(named).parameters
    if "device" in taken:
        options.setdefault("device", device)
    _check_options(config.name, options, taken)
    judge: Reward | DistributionReward = named(**options)
    return judge


class _FunctionReward:
    """A plain function of (images, prompts) as a judge."""

    def __init__(self, name: str, function: Callable[[Tensor, list[Prompt]], Tensor]) -> None:
        self.name = name
        self._function = function

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        return torch.as_tensor(self._function(images, prompts), dtype=torch.float32)


def _load(name: str) -> Callable[..., Any]:
    if name not in REWARDS and ":" not in name:
        raise ValueError(
            f"rewards.name: expected one of {', '.join(REWARDS)} or module:function, got {name!r}"
        )
    module, _, attribute = REWARDS.get(name, name).partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"rewards.name: cannot load {name!r}: {error}") from error
    return found


def _check_options(
    name: str, options: dict[str, Any], taken: Mapping[str, inspect.Parameter]
) -> None:
    unknown = sorted(set(options) - set(taken))
    if unknown:
        raise ValueError(
            f"rewards.{name}.options: expected some of {', '.join(taken)}, got {unknown[0]}"
        )
    for key, parameter in taken.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            raise ValueError(f"rewards.{name}.options: expected {key}, got none")


def _resolved(value: object, cache_dir: str | None) -> object:
    if isinstance(value, str) and value.startswith("digits:"):
        return str(resolve_path(value, cache_dir))
    return value
