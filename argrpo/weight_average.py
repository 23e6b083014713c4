"""A moving average of the policy's weights, for what is shown, evaluated and saved.

average = decay average + (1 - decay) weights      after each step, in fp32
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from argrpo.models.image_policy import ImagePolicy


class WeightAverage:
    """The average beside a module. It starts as the weights are: no bias to correct."""

    def __init__(self, module: nn.Module | ImagePolicy, decay: float) -> None:
        """Holds 4 bytes a weight.

        Args:
            module: whose parameters are averaged.
            decay: share of the average that stays at each update, in (0, 1).

        Raises:
            ValueError: the decay is out of range.
        """
        if not 0 < decay < 1:
            raise ValueError(f"decay: expected a number in (0, 1), got {decay}")
        self._decay = decay
        self._parameters = dict(module.named_parameters())
        self._averages = {
            name: p.detach().to(torch.float32, copy=True) for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        for name, parameter in self._parameters.items():
            self._averages[name].lerp_(parameter.float(), 1 - self._decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Inside, the module's weights are the average; at the same addresses, for the engine."""
        current = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            for name, parameter in self._parameters.items():
                parameter.copy_(self._averages[name])
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.copy_(current[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of the parameters, fp32; not copies."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up where `state_dict` was read.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs.
        """
        wrong = sorted(state.keys() ^ self._averages.keys())
        if wrong:
            raise ValueError(f"{wrong[0]}: expected the averages of these weights, got others")
        for name, average in self._averages.items():
            if state[name].shape != average.shape:
                raise ValueError(
                    f"{name}: expected shape {list(average.shape)}, got {list(state[name].shape)}"
                )
        for name, average in self._averages.items():
            average.copy_(state[name])
