"""Settings of what is measured while a run goes on."""

import math
from dataclasses import dataclass, field
from typing import Literal

from argrpo.reward_config import RewardConfig


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured on images of fixed seeds and conditions, and never optimised.

    The images are of the average of weights, where the run keeps one.
    """

    every: int | None = 50
    """Steps between evaluations; one more stands before the first step and one after the last.
    None never evaluates, and neither does a run without judges and features here."""

    num_images: int = 200
    """Images of an evaluation and guidance scale, spread evenly over the prompts. Distances depend
    on it: compare only like counts. Two or more a prompt also give eval/pairwise_distance (of their
    features) and pairwise_pixels: how different the images of one prompt are."""

    seed: int = 0
    """Of the images; not the run's, so that runs of several seeds are measured on the same."""

    guidance_scales: list[float] = field(default_factory=list)
    """Each is measured on images of its own, 1 without guidance; none takes that of rollout. The
    first one's metrics are eval/NAME, those of another scale S eval/guidance_S/NAME."""

    judges: list[RewardConfig] = field(default_factory=list)
    """Measured as eval/JUDGE/mean, std and win_rate: how often an image scores above that of the
    policy before training, same seed and condition, where a tie counts half. Weights do nothing."""

    features: Literal["inception", "inception_fid", "dinov2", "digits_judge"] = "inception"
    """The network in whose features images are compared with the reference."""

    features_path: str | None = None
    """Its weights: a file for inception, a folder for the others, or digits:heldout_judge. None
    measures no distance."""

    reference: str | None = None
    """Of eval/frechet: an npz file of moments or of images, a folder of images, or
    dataset:digits/SPLIT. Images also give eval/precision, recall, density and coverage; their
    features are held, 4 bytes each."""

    image_size: int | None = None
    """To which images of a folder are cropped and resized first; None: squares of one size."""

    neighbours: int = 3
    """k of precision, recall, density and coverage, by nearest neighbours; 0 measures none."""

    best_metric: str | None = None
    """Name of a metric, as eval/frechet: the policy of the best evaluation is kept under
    checkpoints/best. None keeps none."""

    best_mode: Literal["max", "min"] = "max"
    """Whether a high or a low value is good."""

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(
                f"eval.every: expected at least 1, or null for no evaluation, got {self.every}"
            )
        self._check_scales()
        self._check_features()
        self._check_best()

    @property
    def is_on(self) -> bool:
        """Whether there is an evaluation at all."""
        return self.every is not None and bool(self.judges or self.features_path)

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether one follows a step; 0 is before the first."""
        is_turn = self.every is not None and step % self.every == 0
        return self.is_on and (is_turn or step == num_steps)

    def _check_scales(self) -> None:
        for scale in self.guidance_scales:
            if not 1 <= scale < math.inf:
                raise ValueError(
                    f"eval.guidance_scales: expected finite numbers of at least 1, got {scale}"
                )
        if len(set(self.guidance_scales)) < len(self.guidance_scales):
            raise ValueError(
                f"eval.guidance_scales: expected each once, got {self.guidance_scales}"
            )

    def _check_features(self) -> None:
        if self.features_path is not None and self.reference is None:
            raise ValueError(
                "eval.reference: expected moments or images to compare features with, got none; "
                "argrpo moments makes a file of moments"
            )
        if self.reference is not None and self.features_path is None:
            raise ValueError(
                f"eval.features_path: expected weights of {self.features}, whose features are "
                "compared with eval.reference, got none"
            )
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"eval.image_size: expected at least 1, got {self.image_size}")
        if self.neighbours < 0:
            raise ValueError(f"eval.neighbours: expected at least 0, got {self.neighbours}")
        has_features = self.features_path is not None
        least = max(2, self.neighbours + 1) if has_features else 1
        if self.num_images < least:
            raise ValueError(
                f"eval.num_images: expected at least {least}"
                f"{' to compare their features' if has_features else ''}, got {self.num_images}"
            )

    def _check_best(self) -> None:
        if self.best_metric is None or self.every is None:
            return
        if not self.is_on:
            raise ValueError(
                f"eval.best_metric: expected eval.judges or eval.features_path with it, so that "
                f"{self.best_metric} can be measured, got neither"
            )
        if self.best_metric.endswith("frechet") and self.best_mode == "max":
            raise ValueError(
                f"eval.best_mode: expected min with {self.best_metric}, a distance, got max"
            )
