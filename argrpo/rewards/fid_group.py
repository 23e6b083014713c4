"""AR-GRPO's reward by Frechet distance: that of a part of the batch, in steps, for all of the part.

A step's images are cut into consecutive parts of one size; the distance of each part to a reference
goes through a step map, and every image of the part gets the value. It is not left out one by one,
so it cannot tell images of a part apart: where a part holds a prompt's whole group, the group's
advantages are 0. AR-GRPO has it in its code and no script uses it; prefer `loo_fid`.

The features are those of evaluation/features.py. AR-GRPO's are of the Inception-v3 of published FID
figures, whose distances its thresholds were made for.

Shapes: n images of this process, C features.

Source: Kwai-Klear/AR-GRPO at 65947ad, img_gen_grpo_rewards.py (FIDReward), reward_utils/fid.py.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.evaluation.features import load_extractor
from argrpo.evaluation.frechet import frechet_to
from argrpo.evaluation.frechet_loo import FrechetReference
from argrpo.evaluation.reference_moments import reference_moments
from argrpo.model_paths import blamed_on, named_within
from argrpo.rewards.quantize import StepMap

_LOG = logging.getLogger(__name__)

_THRESHOLDS = (0, 2, 5, 10, 20, 50, 75, 100, 125, 175, 200, 300, 500, 1000)
_VALUES = (-1, 2, 1.8, 1.5, 1.0, 0.9, 0.8, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0)


class FidGroupReward:
    """The value of a part's Frechet distance, for each of its images."""

    def __init__(
        self,
        reference: str,
        features_path: str,
        *,
        features: str = "inception",
        groups: int = 2,
        thresholds: Sequence[float] = _THRESHOLDS,
        values: Sequence[float] = _VALUES,
        image_size: int | None = None,
        device: torch.device,
        reward_batch: int = 64,
        name: str = "fid_group",
    ) -> None:
        """Load the network and the reference.

        One argument for each option of the config, so more than is usual here.

        Args:
            reference: an npz file of moments with covariances, a folder of images, or
                dataset:digits/SPLIT.
            features_path: weights of the network.
            features: which network, a kind of evaluation/features.py.
            groups: parts that a process cuts its images of a step into.
            thresholds: rising distances; none of either: the distance itself, where less is
                better.
            values: one more than thresholds, or as many; see rewards/quantize.py.
            image_size: to which images of a folder are cropped and resized first.
            device: where the network runs and matrices are decomposed.
            reward_batch: images in the network at a time; bounds memory.
            name: under which its scores are logged.

        Raises:
            ValueError: an option is out of range, or moments are of other features, named.
            FileNotFoundError: a path is not there.
        """
        self.name = name
        place = f"rewards.{name}.options"
        if groups < 1:
            raise ValueError(f"{place}.groups: expected at least 1, got {groups}")
        self._groups = groups
        with named_within(place):
            self._steps = StepMap(thresholds, values) if thresholds or values else None
            self._extractor = load_extractor(
                features, features_path, device=device, batch=reward_batch
            )
        with blamed_on(f"{place}.reference"):
            moments = reference_moments(reference, self._extractor, image_size=image_size)
            self._reference = FrechetReference.of(moments.to(device))
        self._distances: list[float] = []

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """The value of each image's part.

        Args:
            images: [n, 3, H, W] in [0, 1], this process's images of a step.
            prompts: n of them; not looked at.

        Returns:
            [n] fp32 on the CPU. NaN for an image whose features are not finite, and for a part in
            which fewer than two others are left.

        Raises:
            ValueError: n is no multiple of `groups`.
        """
        if len(images) % self._groups:
            raise ValueError(
                f"rewards.{self.name}.options.groups: expected a divisor of the {len(images)} "
                f"images of a process and step, got {self._groups}"
            )
        parts = self._extractor(images).chunk(self._groups)
        self._distances = []
        return torch.cat([self._part_scores(part) for part in parts])

    def update(self) -> None:
        """There is no state to move."""

    def metrics(self) -> dict[str, float]:
        """The mean distance of the parts scored last; NaN where none was."""
        known = self._distances
        return {"distance": sum(known) / len(known) if known else torch.nan}

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: a step's scores depend on no other step."""
        return {}

    def _part_scores(self, features: Tensor) -> Tensor:
        is_finite = features.isfinite().all(dim=1)
        scores = torch.full((len(features),), torch.nan)
        counted = features[is_finite]
        if len(counted) < 2:
            _LOG.warning(
                "%s: expected at least 2 images with finite features, got %d; none is scored",
                self.name,
                len(counted),
            )
            return scores
        distance = frechet_to(counted, self._reference)
        self._distances.append(distance)
        value = torch.tensor([distance], dtype=torch.float64)
        scores[is_finite.cpu()] = (value.float() if self._steps is None else self._steps(value))[0]
        return scores
