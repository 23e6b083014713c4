"""Settings of `argrpo eval c2i`."""

from dataclasses import dataclass, field, replace
from typing import Literal

from argrpo.data_config import ClassNames
from argrpo.evaluation.features import FeatureKind
from argrpo.images_config import ImagesConfig, check_scales

_OF_FEATURES = ("frechet", "precision", "recall", "density", "coverage", "pairwise_distance")
METRICS = (
    *_OF_FEATURES,
    "spatial_frechet",
    "inception_score",
    "accuracy",
    "entropy",
    *(f"dinov2_{name}" for name in _OF_FEATURES),
)
"""What may be measured; see evaluation/class_measures.py."""


@dataclass(frozen=True, kw_only=True)
class C2iConfig(ImagesConfig):
    """Draw images over classes and measure them: FID, sFID, IS, precision, recall and diversity."""

    num_images: int = 50_000
    """Of each policy and guidance scale; published figures are of 50,000, and distances depend on
    it."""

    classes: Literal["balanced", "uniform"] = "balanced"
    """balanced: image i is of class i modulo their number; uniform: of a random one, as ADM's and
    LlamaGen's samplers take them. A published reference fits both."""

    labels: list[int] | None = None
    """Class labels to draw, as --labels 207 360; None takes all that the policy knows."""

    names: list[str] | None = None
    """Class names instead of labels, as --names "golden retriever" otter."""

    names_from: ClassNames = "imagenet"
    """Which classes the names are of. digits also takes the embedded held-out judge for features
    and the embedded evaluation split as reference, where neither is given."""

    guidance_scales: list[float] = field(default_factory=lambda: [1.0])
    """Each is measured on images of its own, as --guidance_scales 1 1.5 2; 1 is no guidance."""

    features: FeatureKind = "inception_fid"
    """The network whose features are compared: inception_fid for figures as published, inception
    (torchvision's), dinov2, digits_judge."""

    features_path: str | None = None
    """Its weights; for inception_fid the file of pytorch-fid or torch-fidelity. None measures
    entropy alone."""

    reference: str | None = None
    """What images are compared with: an npz file (ADM's with mu, sigma and arr_0, moments of
    argrpo moments, or images), a folder of images, or dataset:digits/SPLIT. Where a file states
    moments, its images serve precision and recall alone, as in ADM's evaluator."""

    reference_size: int | None = None
    """To which reference images are cropped and resized first; None: squares of one size."""

    dinov2_path: str | None = None
    """Folder of a DINOv2 of transformers: adds FD-DINOv2."""

    dinov2_reference: str | None = None
    """Its reference, where that of the other network holds no images."""

    neighbours: int = 3
    """k of precision, recall, density and coverage; 0 measures none of them."""

    best_by: str = "frechet"
    """The metric by which a policy's best guidance is told: one of the table's."""

    best_mode: Literal["min", "max"] | None = None
    """Whether low or high is best; None: low for distances, high for all others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scales("guidance_scales", self.guidance_scales)
        for scale in self.guidance_scales:
            self.sampling_params(scale)
        if self.labels is not None and self.names is not None:
            raise ValueError("labels: expected labels or names, got both")
        if self.labels == [] or self.names == []:
            raise ValueError("labels: expected at least one class, got none")
        least = max(2, self.neighbours + 1)
        if self.num_images < least:
            raise ValueError(f"num_images: expected at least {least}, got {self.num_images}")
        if self.neighbours < 0:
            raise ValueError(f"neighbours: expected at least 0, got {self.neighbours}")
        if self.features_path is not None and self.reference is None:
            raise ValueError(
                "reference: expected images or moments to compare features with, got none"
            )
        is_embedded = self.names_from == "digits"
        if self.reference is not None and self.features_path is None and not is_embedded:
            raise ValueError(
                f"features_path: expected weights of {self.features}, whose features are compared "
                "with reference, got none"
            )
        if self.best_by not in METRICS:
            raise ValueError(f"best_by: expected one of {', '.join(METRICS)}, got {self.best_by}")
        if self.dinov2_path is not None and not (self.dinov2_reference or self.reference):
            raise ValueError("dinov2_reference: expected images or moments, got none")

    @property
    def lower_is_better(self) -> bool:
        """Of `best_by`."""
        if self.best_mode is not None:
            return self.best_mode == "min"
        return self.best_by.endswith("frechet")


def resolved(config: C2iConfig) -> C2iConfig:
    """The config with what `names_from: digits` stands for written out."""
    if config.names_from != "digits" or config.features_path is not None:
        return config
    return replace(
        config,
        features="digits_judge",
        features_path="digits:heldout_judge",
        reference=config.reference or "dataset:digits/evaluation",
    )
