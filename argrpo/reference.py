"""The model that the KL is measured to: the policy as it was at the start, or some steps ago."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from argrpo.learner_config import ReferenceConfig
from argrpo.models.image_policy import ImagePolicy


class Reference:
    """A frozen copy of the policy."""

    def __init__(self, policy: ImagePolicy, config: ReferenceConfig) -> None:
        """The policy as it is now, apart from it: a child module would be trained and saved too."""
        self._config = config
        self._device = policy.head_weight.device
        self._model = copy.deepcopy(policy).requires_grad_(False)
        # A pass without gradient keeps nothing that could be made again.
        self._model.checkpoints_layers = False
        if config.device == "cpu":
            self._model.to("cpu")
            if self._device.type == "cuda":
                # Pinned pages go to a GPU at the full rate of the bus.
                for parameter in self._model.parameters():
                    parameter.data = parameter.data.pin_memory()

    @contextmanager
    def on_device(self) -> Iterator[ImagePolicy]:
        """The model where the policy is; weights kept on the CPU are there for this long."""
        parameters = list(self._model.parameters())
        homes = [parameter.data for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.data = parameter.data.to(self._device, non_blocking=True)
            yield self._model
        finally:
            for parameter, home in zip(parameters, homes, strict=True):
                parameter.data = home

    @property
    def is_frozen(self) -> bool:
        """Whether it stays what it was at the start of the run."""
        return not self._config.sync_every

    def state_dict(self) -> dict[str, Tensor]:
        """The weights by the names of the policy's parameters; not copies."""
        return {name: p.detach() for name, p in self._model.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up where `state_dict` was read.

        Raises:
            ValueError: a name is missing or unknown, or a shape or dtype differs.
        """
        parameters = dict(self._model.named_parameters())
        wrong = sorted(state.keys() ^ parameters.keys())
        if wrong:
            raise ValueError(f"{wrong[0]}: expected the weights of this reference, got others")
        for name, parameter in parameters.items():
            found = state[name]
            if found.shape != parameter.shape or found.dtype != parameter.dtype:
                raise ValueError(
                    f"{name}: expected {parameter.dtype} {list(parameter.shape)}, got "
                    f"{found.dtype} {list(found.shape)}"
                )
        for name, parameter in parameters.items():
            parameter.copy_(state[name])

    @torch.no_grad()
    def after_step(self, num_steps: int, policy: ImagePolicy) -> None:
        """Become the policy if so many finished steps are a multiple of `sync_every`."""
        every = self._config.sync_every
        if every and num_steps % every == 0:
            pairs = zip(self._model.parameters(), policy.parameters(), strict=True)
            for mine, its in pairs:
                mine.copy_(its)
