"""Fine-tunes autoregressive image models with GRPO, on a rollout engine with its own kernels.

The public names are resolved when they are first asked for, so `import argrpo.kernels.rmsnorm`
loads neither the models nor the command line, and works where their dependencies are missing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argrpo.config import TrainConfig
    from argrpo.data import Prompt
    from argrpo.engine.conditions import TextFeatures
    from argrpo.engine.rollout import Rollout
    from argrpo.engine.rollout_engine import RolloutEngine
    from argrpo.engine.sampling_params import SamplingParams
    from argrpo.models.loading import load_policy, load_tokenizer, save_policy, save_tokenizer
    from argrpo.pipeline import ImagePipeline
    from argrpo.rewards.protocols import DistributionReward, Reward
    from argrpo.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "DistributionReward",
    "ImagePipeline",
    "Prompt",
    "Reward",
    "Rollout",
    "RolloutEngine",
    "SamplingParams",
    "TextFeatures",
    "TrainConfig",
    "Trainer",
    "load_policy",
    "load_tokenizer",
    "save_policy",
    "save_tokenizer",
]

_HOMES = {
    "DistributionReward": "argrpo.rewards.protocols",
    "ImagePipeline": "argrpo.pipeline",
    "Prompt": "argrpo.data",
    "Reward": "argrpo.rewards.protocols",
    "Rollout": "argrpo.engine.rollout",
    "RolloutEngine": "argrpo.engine.rollout_engine",
    "SamplingParams": "argrpo.engine.sampling_params",
    "TextFeatures": "argrpo.engine.conditions",
    "TrainConfig": "argrpo.config",
    "Trainer": "argrpo.trainer",
    "load_policy": "argrpo.models.loading",
    "load_tokenizer": "argrpo.models.loading",
    "save_policy": "argrpo.models.loading",
    "save_tokenizer": "argrpo.models.loading",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'argrpo' has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
