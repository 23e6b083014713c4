"""Settings of a run on several processes."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How a run that torchrun started is spread over its ranks; nothing where there is one."""

    shard: Literal["optimizer", "weights"] = "optimizer"
    """What each rank keeps a part of. optimizer: masters and moments; the working weights stand
    whole on every rank. weights: also the layers' working weights and gradients (FSDP2), for models
    whose training does not fit otherwise; images are then drawn from a copy of the weights, which
    takes room of its own and is refreshed after each optimizer step."""

    save: Literal["whole", "parts"] = "whole"
    """How a checkpoint holds masters and moments. whole: in one file, gathered on the first rank
    (12 bytes a weight of its host's memory). parts: each rank writes its own rows (DCP) into a
    folder beside the checkpoint, which all ranks have to see; the run waits for it. Both are read
    by any number of ranks."""

    split_groups: bool = False
    """Whether the images of one prompt may be drawn on several ranks. Scores are compared within
    the whole group either way; this only lets a step have fewer prompts than there are ranks."""
