"""What features say of a set of images beside references: distance, precision, recall and kin.

Everything about the references is worked out once, so that a set can be measured again and again.
"""

import logging

import torch
from torch import Tensor

from argrpo.evaluation.features import FeatureExtractor
from argrpo.evaluation.frechet import frechet_to
from argrpo.evaluation.frechet_loo import FrechetReference
from argrpo.evaluation.moments import moments_of
from argrpo.evaluation.precision_recall import ball_radii, neighbourhoods
from argrpo.evaluation.reference_moments import reference_features, reference_moments

_LOG = logging.getLogger(__name__)


_OF_IMAGES = ["precision", "recall", "density", "coverage"]


class SetMeasures:
    """The Frechet distance to references and, where these are images, precision and recall,
    density and coverage."""

    def __init__(
        self,
        extractor: FeatureExtractor,
        reference: str,
        *,
        image_size: int | None = None,
        neighbours: int = 3,
        device: torch.device,
    ) -> None:
        """Look at the references.

        Args:
            extractor: makes features, on `device`.
            reference: an npz file of moments, a folder of images, or dataset:digits/SPLIT.
            image_size: to which images of a folder are cropped and resized first.
            neighbours: k of precision, recall, density and coverage; 0 measures none of them.
            device: where matrices are decomposed and neighbours looked for.

        Raises:
            ValueError: moments of other features or without covariances, an image that cannot be
                read, or no more than `neighbours` of them.
            FileNotFoundError: nothing is there.
        """
        self._extractor = extractor
        self._k = neighbours
        self._references: Tensor | None = None
        if neighbours:
            self._references = reference_features(reference, extractor, image_size=image_size)
        if self._references is None:
            moments = reference_moments(reference, extractor, image_size=image_size)
        else:
            moments = moments_of(self._references, extractor.name)
        if moments.cov is None:
            raise ValueError(
                "expected moments with all covariances, got the variance of each feature alone in "
                f"{reference}; make the file again with argrpo moments"
            )
        self._frechet = FrechetReference.of(moments.to(device))
        if self._references is not None:
            if len(self._references) <= neighbours:
                raise ValueError(
                    f"expected more than {neighbours} images, whose neighbours are looked for, "
                    f"got {len(self._references)} in {reference}"
                )
            self._radii = ball_radii(self._references, k=neighbours)

    @property
    def names(self) -> list[str]:
        """What `measure` says."""
        return ["frechet", *([] if self._references is None else _OF_IMAGES)]

    def features(self, images: Tensor) -> Tensor:
        """[N, C] fp32 of images [N, 3, H, W] in [0, 1]."""
        return self._extractor(images)

    def measure(self, features: Tensor) -> dict[str, float]:
        """Of a set of images.

        Args:
            features: [N, C] of generated images. Rows that are not finite are left out; where too
                few stay, everything is NaN.

        Returns:
            A value for each of `names`.
        """
        kept = features[features.isfinite().all(dim=1)]
        if len(kept) < len(features):
            _LOG.warning(
                "eval.features: expected finite features, got others of %d images; left out",
                len(features) - len(kept),
            )
        if len(kept) <= max(self._k, 1):
            return dict.fromkeys(self.names, torch.nan)
        found = {"frechet": frechet_to(kept, self._frechet)}
        if self._references is not None:
            near = neighbourhoods(kept, self._references, k=self._k, radii=self._radii)
            found |= near._asdict()
        return found
