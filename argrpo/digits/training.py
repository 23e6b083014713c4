"""What the small trainings of the digits task share: seeds, the optimizer's loop, progress.

All of them run on the CPU, also where there is a GPU, so that the numbers quoted for the models
hold everywhere. The weights are the same bits every time on one machine with one number of threads;
another number sums in another order.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """AdamW with a linear warm-up and a cosine to zero."""

    steps: int
    """Optimizer steps."""

    batch_size: int = 64
    """Images in a step, drawn with replacement."""

    lr: float = 2e-3
    """Peak learning rate."""

    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""

    weight_decay: float = 0.05
    """AdamW's decoupled decay."""

    seed: int = 0
    """Of the initial weights, the batches and the augmentation."""


def no_progress(stage: str, step: int, steps: int) -> None:
    """Report nothing."""


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Layers made inside draw their weights from `seed`; the caller's random state comes back."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also seed every GPU for good.
        torch.default_generator.manual_seed(seed)
        yield


def fit(
    stage: str,
    parameters: Iterable[nn.Parameter],
    loss_of_step: Callable[[int], Tensor],
    config: FitConfig,
    progress: Progress = no_progress,
) -> None:
    """Minimise a loss.

    Args:
        stage: name for `progress`.
        parameters: what moves.
        loss_of_step: gives step's loss, a scalar with a graph; step counts from 0.
        config: how long and how fast.
        progress: called after each step.

    Raises:
        RuntimeError: the loss stopped being finite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step, config))
    for step in range(config.steps):
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(stage, step + 1, config.steps)
    if config.steps and not math.isfinite(loss.item()):
        raise RuntimeError(f"{stage}: expected a finite loss, got {loss.item()}")


def _lr_share(step: int, config: FitConfig) -> float:
    warmup_steps = max(1, round(config.warmup * config.steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, config.steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * done))
