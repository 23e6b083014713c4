"""Where the memory of a rank goes: to the optimizer step, and what it leaves to the cache."""

from functools import cached_property

import torch

from argrpo.config import TrainConfig
from argrpo.engine.conditions import moved_to
from argrpo.engine.ranges import Ranges
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.memory_preflight import MemoryForecast, available_bytes, forecast_memory
from argrpo.ranks import num_ranks
from argrpo.run_models import RunModels
from argrpo.step_split import one_ranks_share


class RunMemory:
    """Foresees an optimizer step, and builds the engine into what that leaves."""

    def __init__(self, config: TrainConfig, models: RunModels, device: torch.device) -> None:
        self._config = config
        self._share = one_ranks_share(config, num_ranks())
        self._models = models
        self._device = device

    def describe(self) -> list[str]:
        """What an optimizer step will hold and which micro-batch fits, in words."""
        return self._forecast.describe(self._share, self._bytes_for_a_step())

    def make_engine(self, ranges: Ranges) -> RolloutEngine:
        """The engine of the run; `ranges` is told of its work.

        Raises:
            ValueError: `kv_bytes` is too little for one image.
        """
        config = self._config
        own_images = config.images_per_step // num_ranks()
        kv_bytes = config.kv_bytes
        if kv_bytes is None and self._device.type == "cuda":
            # The cache stays while the optimizer steps.
            kv_bytes = self._forecast.left_for_cache(self._share, self._bytes_for_a_step())
        return RolloutEngine(
            self._models.policy,
            max_slots=min(config.max_slots or own_images, own_images),
            kv_bytes=kv_bytes,
            deterministic=config.deterministic,
            ranges=ranges,
        )

    @cached_property
    def _forecast(self) -> MemoryForecast:
        conditions = moved_to(self._models.prompts.probe(), self._device)
        return forecast_memory(self._models.policy, self._share, conditions)

    def _bytes_for_a_step(self) -> int:
        # Judges, tokenizer and weights stand already; the weights are part of the forecast.
        return available_bytes(self._device) + self._forecast.weights
