"""How far the log-probs that are trained on lie from those that the engine recorded at the draw,
over the images of all ranks.

Shapes: n images of an optimizer step, T tokens of an image.
"""

import torch
from torch import Tensor

from argrpo.engine.rollout import Rollout
from argrpo.ranks import gather_rows


def draw_difference(rollout: Rollout, rows: Tensor, logprobs: Tensor) -> dict[str, float]:
    """Mean and quantiles of the absolute difference, by log name.

    Args:
        rollout: all images of a step.
        rows: [n] int64, which of them.
        logprobs: [n, T] of the policy that trains, before it moved.
    """
    own = (logprobs - rollout.logprobs[rows]).abs()
    difference = gather_rows(own)[0].flatten().sort().values
    last = len(difference) - 1
    chosen = difference[[last // 2, last * 99 // 100, last]]
    values = torch.cat([difference.mean()[None], chosen]).tolist()
    names = ("mean", "p50", "p99", "max")
    return {
        f"sampling/sampling_logp_difference/{name}": value
        for name, value in zip(names, values, strict=True)
    }


def draw_ratio(rollout: Rollout, rows: Tensor, logprobs: Tensor) -> float:
    """Largest abs(ratio - 1) of the policy that trains to the one that drew."""
    own = (logprobs - rollout.logprobs[rows]).expm1().abs().max()
    return gather_rows(own.view(1, 1))[0].max().item()
