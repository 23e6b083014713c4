"""Joining and leaving the other processes of a run, which torchrun started.

CPU tensors travel by gloo and GPU tensors by NCCL, on one process group: the few bytes of a
meeting (argrpo/ranks.py) never wait for a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from argrpo.ranks import PeerError, tell_failure

_TIMEOUT = timedelta(minutes=30)  # how much later than others a rank may come to a meeting


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextmanager
def process_group(timeout: timedelta = _TIMEOUT) -> Iterator[None]:
    """Inside, the processes that torchrun started are the ranks of one run.

    What is raised inside on one rank is raised on the others as a `PeerError`, at their next
    meeting. Does nothing where torchrun did not start the process.

    Args:
        timeout: how long ranks wait for each other.

    Raises:
        PeerError: a rank failed.
        RuntimeError: a rank did not come, or a node has fewer GPUs than processes.
    """
    if not is_launched():
        yield
        return
    own_gpu = _own_gpu()
    if own_gpu is not None:
        torch.cuda.set_device(own_gpu)
    dist.init_process_group("gloo" if own_gpu is None else "cpu:gloo,cuda:nccl", timeout=timeout)
    with failures_told():
        yield


@contextmanager
def failures_told() -> Iterator[None]:
    """Around a run on a process group that stands: tells failures, and leaves the group.

    For a program that joined a group in its own way; `process_group` has this built in.
    """
    try:
        yield
    except PeerError:
        raise
    except BaseException as error:
        tell_failure(str(error) or type(error).__name__, 1)
        raise
    finally:
        dist.destroy_process_group()


def _own_gpu() -> int | None:
    """The GPU of this process among those of its node; None where there is none."""
    count, wanted = torch.cuda.device_count(), dist.get_node_local_rank()
    if count == 0:
        return None
    if wanted >= count:
        raise RuntimeError(
            f"--nproc-per-node: expected at most {count}, the GPUs of this machine, got a process "
            f"number {wanted}; or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    return wanted
