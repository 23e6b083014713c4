"""Judges by name. A judge is imported when it is first asked for, never before.

Two names hold another one: quantize(JUDGE) takes the options of JUDGE and those of its map, see
rewards/quantize.py; iqa:METRIC is a metric of pyiqa, see rewards/iqa.py.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from argrpo.model_paths import named_within, resolve_path
from argrpo.reward_config import RewardConfig
from argrpo.rewards.callables import function_reward
from argrpo.rewards.lanes import Judge
from argrpo.rewards.protocols import Batched
from argrpo.rewards.sharing import SharedNetworks

REWARDS = {
    "digits_judge": "argrpo.digits.judges:DigitJudgeReward",
    "digits_attributes": "argrpo.digits.attribute_reward:AttributeReward",
    "clip": "argrpo.rewards.clip:ClipReward",
    "hpsv2": "argrpo.rewards.clip:Hpsv2Reward",
    "pickscore": "argrpo.rewards.clip:PickScoreReward",
    "aesthetic": "argrpo.rewards.aesthetic:AestheticReward",
    "maniqa": "argrpo.rewards.maniqa:ManiqaReward",
    "iqa": "argrpo.rewards.iqa:IqaReward",
    "mse": "argrpo.rewards.image_distance:MseReward",
    "lpips": "argrpo.rewards.image_distance:LpipsReward",
    "loo_fid": "argrpo.rewards.loo_fid:LooFidReward",
    "fid_group": "argrpo.rewards.fid_group:FidGroupReward",
    "qwen_vl": "argrpo.rewards.qwen_vl:QwenVlReward",
    "vlm_server": "argrpo.rewards.vlm_server:VlmServerReward",
    "unified_reward": "argrpo.rewards.vlm_server:UnifiedRewardServer",
    "server": "argrpo.rewards.reward_server:ServerReward",
    "deqa": "argrpo.rewards.reward_server:DeqaReward",
    "geneval": "argrpo.rewards.reward_server:GenevalReward",
    "imagereward": "argrpo.rewards.reward_server:ImageRewardServer",
}

SERVED = {"qwen_vl": "argrpo.rewards.vlm_server:QwenVlServer"}
"""Judges that a server answers for where they have an option url."""

_IQA = "iqa:"
_QUANTIZE = re.compile(r"quantize\((.+)\)")


def make_reward(
    config: RewardConfig,
    device: torch.device,
    cache_dir: str | None,
    shared: SharedNetworks | None = None,
) -> Judge:
    """The judge that a config names, of one of the kinds of rewards/protocols.py.

    A name of `REWARDS`, or module:class, is built with the options (and the device, if it takes
    one). module:function is the judge itself, as rewards/callables.py calls it, without options.
    Options that start with digits: stand for files of the embedded task. Judges that are made with
    the same `shared` load the networks that they have in common once. One of `SERVED` with an
    option url is asked there and loads nothing.

    Raises:
        ValueError: no such judge, an option that it does not take, or one that it lacks, named.
    """
    shared = shared or SharedNetworks()
    quantized = _QUANTIZE.fullmatch(config.name)
    if quantized is not None:
        return _make_quantized(quantized[1], config, device, cache_dir, shared)
    if config.name.startswith(_IQA):
        options = {**config.options, "metric": config.name.removeprefix(_IQA)}
        return make_reward(replace(config, name="iqa", options=options), device, cache_dir, shared)
    is_served = config.name in SERVED and "url" in config.options
    named = _load(SERVED[config.name] if is_served else config.name)
    if config.name not in REWARDS and not inspect.isclass(named):
        if config.options:
            raise ValueError(
                f"rewards.{config.name}.options: expected none for a function, "
                f"got {', '.join(config.options)}"
            )
        return function_reward(config.name, named)
    options = {key: _resolved(value, cache_dir) for key, value in config.options.items()}
    taken = inspect.signature(named).parameters
    for key, value in (("device", device), ("shared", shared)):
        if key in taken:
            options.setdefault(key, value)
    _check_options(config.name, options, taken)
    judge: Judge = named(**options)
    if isinstance(judge, Batched) and judge.reward_batch < 1:
        raise ValueError(
            f"rewards.{config.name}.options.reward_batch: expected at least 1, got "
            f"{judge.reward_batch}"
        )
    return judge


def _make_quantized(
    inner: str,
    config: RewardConfig,
    device: torch.device,
    cache_dir: str | None,
    shared: SharedNetworks,
) -> Judge:
    from argrpo.rewards.quantize import STEP_OPTIONS, make_steps, quantized

    options = dict(config.options)
    name = options.pop("name", None)
    mapping = {key: options.pop(key) for key in STEP_OPTIONS if key in options}
    with named_within(f"rewards.{config.name}.options"):
        steps = make_steps(mapping)
    judge = make_reward(RewardConfig(name=inner, options=options), device, cache_dir, shared)
    return quantized(judge, steps, name or f"{judge.name}_quantized")


def _load(name: str) -> Callable[..., Any]:
    if name not in REWARDS and ":" not in name:
        raise ValueError(
            f"rewards.name: expected one of {', '.join(REWARDS)} or module:function, got {name!r}"
        )
    module, _, attribute = REWARDS.get(name, name).partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    # ValueError: of a module without a name.
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"rewards.name: cannot load {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"rewards.name: expected a function or a class, got {name} = {found!r}")
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
