"""What all ranks of a run must have in common before they train together."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from argrpo.config import TrainConfig
from argrpo.models.image_policy import ImagePolicy
from argrpo.ranks import expect_alike, is_first, meet
from argrpo.run_folder import RunFolder, config_text

_BITS = {2: torch.int16, 4: torch.int32}


def check_alike(config: TrainConfig, policy: ImagePolicy) -> None:
    """Compare the settings and the weights of all ranks, which read them from files of their own.

    Raises:
        ValueError: they differ; raised by all ranks.
        PeerError: a rank failed.
    """
    # The cache may lie elsewhere on another machine.
    text = config_text(replace(config, cache_dir=None))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    expect_alike("--config", torch.tensor([int.from_bytes(digest, "little", signed=True)]))
    expect_alike("policy.path", weights_checksum(policy))


def common_folder(path: str, *, may_hold_run: bool = False) -> RunFolder:
    """The folder of a run, made by the first rank; one that holds a run if that may be.

    Raises:
        ValueError: as `RunFolder.create`.
        PeerError: another rank failed.
    """
    folder = RunFolder(Path(path).expanduser())
    if is_first():
        RunFolder.create(path, may_hold_run=may_hold_run)
    meet("output_dir")
    return folder


@torch.no_grad()
def weights_checksum(policy: ImagePolicy) -> Tensor:
    """[K] int64 on the CPU: the sum of the bits of each of K weights.

    A sum of integers, so that no order of adding on another GPU changes it.
    """
    weights = [weight.detach() for _, weight in policy.named_parameters()]
    sums = [w.view(_BITS[w.itemsize]).sum(dtype=torch.int64) for w in weights]
    return torch.stack(sums).cpu()
