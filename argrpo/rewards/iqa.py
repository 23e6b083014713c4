"""Quality of an image by any metric of pyiqa, as iqa:NAME.

The scores are pyiqa's own, whichever direction is better: give a metric of which less is better
(niqe, lpips) a negative weight. Metrics with a reference compare with the prompt's reference image;
images without one are not scored, which is no failure. MANIQA is quicker as `maniqa`, see
rewards/maniqa.py.

Source: chaofengc/IQA-PyTorch at 01ae427.
"""

from typing import Any

import torch
from torch import Tensor, nn

from argrpo.data import Prompt
from argrpo.model_paths import named_within
from argrpo.rewards.pyiqa_networks import build_metric
from argrpo.rewards.reference_images import have_reference, references_of, scattered
from argrpo.rewards.sharing import ImageMemo, Residence, SharedNetworks


class IqaReward:
    """One metric of pyiqa."""

    def __init__(
        self,
        metric: str,
        weights: str | None = None,
        *,
        settings: dict[str, Any] | None = None,
        device: torch.device,
        reward_batch: int = 16,
        offload: bool = False,
        shared: SharedNetworks | None = None,
        name: str | None = None,
    ) -> None:
        """Build the metric from local files.

        Args:
            metric: its name in pyiqa.
            weights: a file with all of its weights; see rewards/pyiqa_networks.py.
            settings: of its network, over pyiqa's own.
            device: where it runs.
            reward_batch: images scored at a time; bounds memory.
            offload: keep the weights on the CPU between steps.
            shared: networks of other judges.
            name: under which its scores are logged; None: that of the metric.

        Raises:
            ValueError: no such metric, it cannot be built so, or the file is not its.
            FileNotFoundError: a file is missing.
        """
        self.name = name or metric
        self.reward_batch = reward_batch

        def load() -> _LoadedMetric:
            with named_within(f"rewards.iqa:{metric}.options"):
                built = build_metric(metric, weights, settings)
            return _LoadedMetric(built.network, built.needs_reference, device, offload)

        key = (IqaReward, metric, weights, repr(settings), device, offload)
        self._loaded = (shared or SharedNetworks()).once(key, load)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts -> [N] fp32, NaN = not scored."""
        if not self._loaded.needs_reference:
            return self._loaded.scores(images, self.reward_batch)
        rows, references = references_of(images, prompts)
        compared = self._loaded.compare(images[rows], references, self.reward_batch)
        return scattered(compared, rows, len(images))

    def applies(self, prompts: list[Prompt]) -> list[bool]:
        """Where there is a reference, if it compares with one."""
        if not self._loaded.needs_reference:
            return [True] * len(prompts)
        return have_reference(prompts)

    def rest(self) -> None:
        """Off the device until it is asked again, with the option offload."""
        self._loaded.residence.rest()


class _LoadedMetric:
    """A network and what it said of the images seen last."""

    def __init__(
        self, network: nn.Module, needs_reference: bool, device: torch.device, offload: bool
    ) -> None:
        self.needs_reference = needs_reference
        self.residence = Residence(network, device, offload=offload)
        self._network = network
        self._device = device
        self._memo = ImageMemo()

    def scores(self, images: Tensor, batch: int) -> Tensor:
        """[N] fp32."""

        def score(missing: Tensor, _: list[int]) -> Tensor:
            return torch.cat([self._run(part) for part in missing.split(batch)])

        return self._memo.rows(images, batch, score)

    def compare(self, images: Tensor, references: Tensor, batch: int) -> Tensor:
        """[M] fp32."""
        pairs = zip(images.split(batch), references.split(batch), strict=True)
        parts = [self._run(a, b) for a, b in pairs if len(a)]
        return torch.cat([torch.empty(0, device=self._device), *parts])

    def _run(self, *images: Tensor) -> Tensor:
        self.residence.wake()
        found = self._network(*(part.to(self._device).float() for part in images))
        scores: Tensor = (found[0] if isinstance(found, tuple) else found).float().flatten()
        assert len(scores) == len(images[0]), "a metric of single images scores each"
        return scores
