"""`argrpo moments`: what a distribution reward compares with, made once and kept in a file.

The network and its preprocessing are those of the reward, so that both see images alike.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from argrpo.devices import choose_device
from argrpo.evaluation.features import FeatureKind, load_extractor
from argrpo.evaluation.moment_files import save_moments
from argrpo.evaluation.moments import Moments
from argrpo.evaluation.reference_moments import reference_moments
from argrpo.model_paths import blamed_on, resolve_path
from argrpo.progress import Report, unreported


@dataclass(frozen=True, kw_only=True)
class MomentsConfig:
    """Mean and covariance of images' features, as a file that the loo_fid reward compares with."""

    images: str
    """Folder of images, searched with its folders; or dataset:digits/SPLIT, the embedded ones."""

    output: str
    """The npz file to write."""

    features_path: str
    """Weights of the network: a file for inception, a folder for the others; digits:reward_judge
    is an embedded one."""

    features: FeatureKind = "inception"
    """The network that makes features."""

    image_size: int | None = None
    """Crop to the middle square and resize to this many pixels first: the size of the policy's
    images. None takes images as they are; they must be squares of one size."""

    batch: int = 64
    """Images in the network at a time; bounds memory."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""

    cache_dir: str | None = None
    """Where the embedded models are kept; None: argrpo under the user's cache folder."""

    def __post_init__(self) -> None:
        if Path(self.output).suffix != ".npz":
            raise ValueError(f"output: expected a name that ends in .npz, got {self.output}")
        if Path(self.output).exists():
            raise ValueError(f"output: expected a file that is not there yet, got {self.output}")
        if self.batch < 1:
            raise ValueError(f"batch: expected at least 1, got {self.batch}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size: expected at least 1, got {self.image_size}")


def write_moments(config: MomentsConfig, report: Report = unreported) -> Moments:
    """Make moments and write them into the file.

    Args:
        config: of what, by what, where to.
        report: told how many images are done.

    Raises:
        ValueError: images or weights that cannot be read or do not fit, named.
        FileNotFoundError: a path is not there.
        StorageError: the disk is full or refused.
    """
    device = choose_device(config.device)
    path = resolve_path(config.features_path, config.cache_dir)
    extractor = load_extractor(config.features, path, device=device, batch=config.batch)
    with blamed_on("images"):
        moments = reference_moments(
            config.images,
            extractor,
            image_size=config.image_size,
            batch=config.batch,
            report=report,
        )
    save_moments(moments, Path(config.output))
    return moments
