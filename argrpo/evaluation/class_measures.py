"""All that is said of a finished set of class-conditional images: quality, and diversity beside it.

frechet            FID where the network is inception_fid
spatial_frechet    sFID, where network and reference have its features
inception_score    where the network is a classifier (IS where it is inception_fid)
precision ... coverage   see precision_recall.py
accuracy           share of images in which the network sees the class asked for
pairwise_distance  between images of one class, in features
dinov2_...         the same in DINOv2's features; dinov2_frechet is FD-DINOv2
entropy            nats a token, of the distribution drawn from
"""

import logging

import torch
from torch import Tensor

from argrpo.eval_c2i_config import C2iConfig
from argrpo.evaluation.diversity import distance_within, has_pairs
from argrpo.evaluation.features import FeatureExtractor, Views, load_extractor
from argrpo.evaluation.image_set import ImageSet, NetworkLook
from argrpo.evaluation.inception_score import NUM_SPLITS, inception_score
from argrpo.evaluation.set_measures import SetMeasures
from argrpo.model_paths import blamed_on, resolve_path

_LOG = logging.getLogger(__name__)

# Networks whose classes are those of the labels: ImageNet's in torchvision's order, and digits.
_SAME_CLASSES = ("inception", "digits_judge")


def extractors_of(config: C2iConfig, device: torch.device) -> dict[str, FeatureExtractor]:
    """The networks that look at images, by what stands before their metrics.

    Raises:
        ValueError, FileNotFoundError: weights that do not fit or are not there.
    """
    found: dict[str, FeatureExtractor] = {}
    if config.features_path is not None:
        path = resolve_path(config.features_path, config.cache_dir)
        found[""] = load_extractor(config.features, path, device=device)
    if config.dinov2_path is not None:
        with blamed_on("dinov2_path"):
            found["dinov2_"] = load_extractor("dinov2", config.dinov2_path, device=device)
    return found


class ClassMeasures:
    """Measures of sets of images; references are worked out once.

    Args:
        config: which references.
        extractors: of `extractors_of`.
        device: where matrices are decomposed and neighbours looked for.

    Raises:
        ValueError, FileNotFoundError: references that do not fit or are not there.
    """

    def __init__(
        self, config: C2iConfig, extractors: dict[str, FeatureExtractor], device: torch.device
    ) -> None:
        self._config, self._extractors = config, extractors
        self._measures: dict[str, SetMeasures] = {}
        for prefix, extractor in extractors.items():
            own = config.dinov2_reference if prefix else None
            setting = "reference" if own is None else "dinov2_reference"
            with blamed_on(setting):
                self._measures[prefix] = SetMeasures(
                    extractor,
                    own or str(config.reference),
                    image_size=config.reference_size,
                    neighbours=config.neighbours,
                    spatial=config.features == "inception_fid" and not prefix,
                    device=device,
                )

    def measure(self, images: ImageSet, labels: Tensor) -> dict[str, float]:
        """Everything at the top of this file that can be said of a finished set.

        Args:
            images: the set.
            labels: [N] int64, the class of each image.
        """
        found: dict[str, float] = {}
        for prefix, measures in self._measures.items():
            views = Views(**images.seen(NetworkLook(self._extractors[prefix])))
            said = measures.measure(views.features)
            if not prefix:
                said |= self._of_classifier(measures, views, labels)
            if has_pairs(labels):
                said["pairwise_distance"] = distance_within(views.features, labels)
            found |= {f"{prefix}{name}": value for name, value in said.items()}
        return {**found, "entropy": images.entropies().mean().item()}

    def _of_classifier(
        self, measures: SetMeasures, views: Views, labels: Tensor
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        if views.spatial is not None:
            spatial = measures.spatial_frechet(views.spatial)
            found |= {} if spatial is None else {"spatial_frechet": spatial}
        if views.logits is None:
            return found
        if len(views.logits) >= NUM_SPLITS:
            score = inception_score(views.logits)
            found |= {"inception_score": score.mean, "inception_score_std": score.std}
        else:
            _LOG.warning("inception_score: expected at least %d images, got fewer", NUM_SPLITS)
        if self._config.features in _SAME_CLASSES:
            hits = views.logits.argmax(dim=1) == labels
            found["accuracy"] = hits.double().mean().item()
        return found
