"""Which images of a step each rank draws, scores and learns from.

Images are numbered over the whole step, and a token depends on its image's number and not on the
rank that draws it. So a step has the same images on any number of ranks, up to how a library's
products round with the number of slots (engine/rollout_engine.py): exactly the same at an equal
number of slots, as with max_slots, or with deterministic.

Where the numbers allow it each optimizer step also learns from the same images on any number of
ranks: rank r takes its part of every minibatch. Otherwise its minibatches are parts of its own
stretch of images.

Shapes: N images of a step, n = N / R of one of R ranks.
"""

from dataclasses import replace

import torch
from torch import Tensor

from argrpo.config import TrainConfig
from argrpo.distributed_config import DistributedConfig


def split_images(config: TrainConfig, rank: int, num_ranks: int) -> Tensor:
    """[n] int64: the images of a rank, in the order in which it learns from them.

    Raises:
        ValueError: the images of a step cannot be dealt out evenly, or minibatches not be made of
            a rank's images.
    """
    whole = 1 if config.distributed.split_groups else config.images_per_prompt
    num_parts = config.images_per_step // whole
    if num_parts % num_ranks:
        raise ValueError(_uneven(config, num_ranks))
    if config.distributed.split_groups and config.parity.entropy_by_completion:
        raise ValueError(
            "distributed.split_groups: expected false with parity.entropy_by_completion, got true"
        )
    own = config.images_per_step // num_ranks
    if own % config.minibatches:
        raise ValueError(
            f"minibatches: expected a divisor of the {own} images of a rank, got "
            f"{config.minibatches}"
        )
    ids = torch.arange(config.images_per_step)
    if has_common_minibatches(config, num_ranks):
        return ids.view(config.minibatches, num_ranks, -1)[:, rank].flatten()
    return ids.view(num_ranks, own)[rank]


def has_common_minibatches(config: TrainConfig, num_ranks: int) -> bool:
    """Whether the optimizer steps learn from the same images as those of one rank would."""
    whole = 1 if config.distributed.split_groups else config.images_per_prompt
    return (config.images_per_step // whole) % (config.minibatches * num_ranks) == 0


def one_ranks_share(config: TrainConfig, num_ranks: int) -> TrainConfig:
    """A run of one rank with as many images a step as each of several has, to foresee its needs."""
    if num_ranks == 1:
        return config
    own = config.images_per_step // num_ranks
    group = config.images_per_prompt if own % config.images_per_prompt == 0 else max(own, 2)
    return replace(
        config,
        prompts_per_step=max(own // group, 1),
        images_per_prompt=group,
        distributed=DistributedConfig(),
    )


def describe_split(config: TrainConfig, num_ranks: int) -> list[str]:
    """What each rank does, in words; nothing to say where there is one."""
    if num_ranks == 1:
        return []
    own = config.images_per_step // num_ranks
    lines = [f"{num_ranks} ranks, each draws, scores and learns from {own} images a step"]
    if config.distributed.shard == "weights":
        lines.append(
            "layers are spread over the ranks while they train; images are drawn from a whole copy "
            "on each, which is refreshed after every optimizer step"
        )
    if config.minibatches > 1 and not has_common_minibatches(config, num_ranks):
        lines.append(
            "minibatches are made of each rank's own prompts, and so of other images than on one "
            f"rank; prompts_per_step a multiple of {config.minibatches * num_ranks} avoids it"
        )
    return lines


def _uneven(config: TrainConfig, num_ranks: int) -> str:
    if config.distributed.split_groups:
        return (
            f"prompts_per_step: expected a number of images that {num_ranks} ranks can share "
            f"evenly, got {config.images_per_step}"
        )
    return (
        f"prompts_per_step: expected a multiple of the {num_ranks} ranks, got "
        f"{config.prompts_per_step}; or set distributed.split_groups"
    )
