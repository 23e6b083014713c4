"""What features say of a set of images beside references: distance, precision, recall and kin.

Everything about the references is worked out once, so that a set can be measured again and again.
"""

import logging

import torch
from torch import Tensor

from argrpo.evaluation.features import FeatureExtractor, Views
from argrpo.evaluation.frechet import frechet_to
from argrpo.evaluation.frechet_loo import FrechetReference
from argrpo.evaluation.moment_files import has_moments, has_spatial_moments, load_moments
from argrpo.evaluation.moments import Moments, moments_of
from argrpo.evaluation.precision_recall import ball_radii, neighbourhoods
from argrpo.evaluation.reference_moments import (
    check_same_space,
    reference_moments,
    reference_views,
)

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
        spatial: bool = False,
        device: torch.device,
    ) -> None:
        """Look at the references.

        Args:
            extractor: makes features, on `device`.
            reference: an npz file of moments, images or both, a folder of images, or
                dataset:digits/SPLIT.
            image_size: to which images are cropped and resized first.
            neighbours: k of precision, recall, density and coverage; 0 measures none of them.
            spatial: also take the references of sFID, where network and references have them.
            device: where matrices are decomposed and neighbours looked for.

        Raises:
            ValueError: moments of other features or without covariances, an image that cannot be
                read, or no more than `neighbours` of them.
            FileNotFoundError: nothing is there.
        """
        self._extractor, self._k = extractor, neighbours
        views = None
        if neighbours or (spatial and not has_spatial_moments(reference)):
            views = reference_views(reference, extractor, image_size=image_size)
        if views is None or has_moments(reference):
            moments = reference_moments(reference, extractor, image_size=image_size)
        else:
            moments = moments_of(views.features, extractor.name)
        if views is not None and has_moments(reference):
            check_same_space(views.features, moments, reference)
        self._frechet = _frechet_reference(moments, reference, device)
        found = _spatial_moments(reference, views) if spatial else None
        self._spatial = None if found is None else FrechetReference.of(found.to(device))
        self._references: Tensor | None = None
        if neighbours and views is not None:
            self._references = views.features.to(device)
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
        features = features.to(self._frechet.mean.device)
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

    def spatial_frechet(self, spatial: Tensor) -> float | None:
        """sFID of features [N, 2023]; None where the references have none."""
        reference = self._spatial
        if reference is None:
            return None
        return frechet_to(spatial.to(reference.mean.device), reference)


def _frechet_reference(moments: Moments, source: str, device: torch.device) -> FrechetReference:
    if moments.cov is None:
        raise ValueError(
            "expected moments with all covariances, got the variance of each feature alone in "
            f"{source}; make the file again with argrpo moments"
        )
    return FrechetReference.of(moments.to(device))


def _spatial_moments(source: str, views: Views | None) -> Moments | None:
    if has_spatial_moments(source):
        return load_moments(source, spatial=True)
    return None if views is None or views.spatial is None else moments_of(views.spatial)
