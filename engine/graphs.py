"""A decode step as something to replay: a captured CUDA graph on a GPU, the step itself elsewhere.

A step takes nothing and returns nothing: it reads and writes tensors that stay where they are, so
that a replay does the same work on whatever they hold by then.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch

Step: TypeAlias = Callable[[], None]

# Before a capture: kernels are compiled and loaded, and libraries take their workspaces.
_WARM_UPS = 2


def capture_step(step: Step, device: torch.device) -> Step:
    """What replays `step`.

    On a GPU the step runs a few times first, so call this while its rows are idle.

    Args:
        step: one decode step, or several, without any wait for the device.
        device: where its tensors are.
    """
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
