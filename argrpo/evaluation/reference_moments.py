"""Moments of the images that others are compared with: from a file, a folder or a dataset.

Images go through the same network and preprocessing as generated ones. A file of ADM's holds both:
moments of all images of a dataset, and some thousands of the images.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as VF

from argrpo.digits.dataset import load_split
from argrpo.evaluation.features import FeatureExtractor, Views
from argrpo.evaluation.moment_files import has_moments, load_moments
from argrpo.evaluation.moments import Moments, MomentSums
from argrpo.evaluation.sample_files import count_images, has_images, read_samples
from argrpo.progress import Report, unreported

_LOG = logging.getLogger(__name__)

_DATASET = "dataset:"
_DIGITS = "digits/"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Of |mean - mean|^2 over the trace of the covariance; another network's is of order 1 and above.
_LARGEST_GAP = 0.25
_SHEET = "grid.png"  # `argrpo sample` leaves one among its images


def reference_moments(
    source: str,
    extractor: FeatureExtractor,
    *,
    image_size: int | None = None,
    batch: int = 64,
    report: Report = unreported,
) -> Moments:
    """Moments from an npz file, a folder of images or `dataset:digits/SPLIT`.

    Those that a file states count, and its images only where it states none.

    Args:
        source: the file, folder or dataset.
        extractor: makes the features; those of a file must be its own.
        image_size: of a folder: crop to the middle square and resize to it first. None: images
            must be squares of one size.
        batch: images read at a time.
        report: told how many of a folder's images are done.

    Raises:
        ValueError: there are none or they do not fit the extractor, or an image cannot be read.
        FileNotFoundError: nothing is there.
    """
    if not has_moments(source):
        parts = _parts(source, image_size, batch, report)
        if parts is not None:
            return _sums(parts, extractor)
    if not Path(source).exists():
        raise FileNotFoundError(f"expected an npz file or a folder of images, got {source}")
    moments = load_moments(source)
    check_moments(moments, extractor, source)
    return moments


def reference_views(
    source: str,
    extractor: FeatureExtractor,
    *,
    image_size: int | None = None,
    batch: int = 64,
    report: Report = unreported,
) -> Views | None:
    """What the network says of all images of a file, a folder or a dataset, on the CPU; None where
    `source` has no images, as a file of moments alone.

    Arguments and errors as of `reference_moments`.
    """
    parts = _parts(source, image_size, batch, report)
    if parts is None:
        return None
    seen = [extractor.views(part) for part in parts]
    names = [field.name for field in fields(Views) if getattr(seen[0], field.name) is not None]
    return Views(
        **{name: torch.cat([getattr(view, name).cpu() for view in seen]) for name in names}
    )


def check_same_space(features: Tensor, moments: Moments, source: str) -> None:
    """Refuse a file whose moments are not of the features that its own images have.

    The means of two networks' features lie far apart, measured by their spread; that of some
    images lies near that of all of them.

    Args:
        features: [M, C] of the file's images.
        moments: stated by the file.
        source: the file.

    Raises:
        ValueError: they are of another network or preprocessing.
    """
    spread = moments.std.square().sum()
    gap = (features.double().mean(dim=0).cpu() - moments.mean.cpu()).square().sum() / spread.cpu()
    if gap > _LARGEST_GAP + 10.0 / len(features):
        raise ValueError(
            f"expected moments of the features that the file's own images have, got a mean "
            f"{gap**0.5:.2g} spreads away from theirs in {source}; it was made by another network "
            "or preprocessing: take the features that it was made by, or images as reference"
        )


def check_moments(moments: Moments, extractor: FeatureExtractor, source: str) -> None:
    """Refuse moments of other features.

    Raises:
        ValueError: another number of them, or another network where the file names it.
    """
    remedy = "make the file with argrpo moments and the same features and features_path"
    if moments.dim != extractor.dim:
        raise ValueError(
            f"expected moments of {extractor.dim} features as {extractor.name} makes them, got "
            f"{moments.dim} in {source}; {remedy}"
        )
    if moments.features is None:
        _LOG.warning(
            "%s does not say what made its features; taken as those of %s", source, extractor.name
        )
    # A published file names the kind of its network and not the weights.
    elif moments.features not in (extractor.name, extractor.name.partition("-")[0]):
        raise ValueError(
            f"expected moments of features by {extractor.name}, got those of {moments.features} "
            f"in {source}; {remedy}"
        )


def _parts(
    source: str, image_size: int | None, batch: int, report: Report
) -> Iterable[Tensor] | None:
    """The images of a folder or a dataset, part by part."""
    if source.startswith(_DATASET):
        return _dataset(source).split(batch)
    path = Path(source)
    if path.is_dir():
        return _images(path, image_size, batch, report)
    return _samples(path, image_size, batch, report) if has_images(path) else None


def _sums(parts: Iterable[Tensor], extractor: FeatureExtractor) -> Moments:
    sums = MomentSums(extractor.dim)
    for part in parts:
        sums.add(extractor(part))
    return sums.moments(extractor.name)


def _dataset(source: str) -> Tensor:
    name = source.removeprefix(_DATASET)
    if not name.startswith(_DIGITS):
        raise ValueError(f"expected {_DATASET}{_DIGITS}SPLIT, got {source}")
    return load_split(name.removeprefix(_DIGITS)).images


def _images(folder: Path, image_size: int | None, batch: int, report: Report) -> Iterator[Tensor]:
    """Parts [n, 3, H, W] fp32 in [0, 1] of all images, in the order of their paths."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES and path.name != _SHEET
    )
    if not paths:
        raise ValueError(f"expected images ({', '.join(_SUFFIXES)}), got none in {folder}")
    first: Tensor | None = None
    for start in range(0, len(paths), batch):
        part = [_image(path, image_size) for path in paths[start : start + batch]]
        first = part[0] if first is None else first
        for path, image in zip(paths[start:], part, strict=False):
            if image.shape != first.shape or image.shape[1] != image.shape[2]:
                raise ValueError(
                    f"expected squares of one size in {folder}, got {list(image.shape[1:])} in "
                    f"{path.name}; image_size crops and resizes them"
                )
        yield torch.stack(part)
        report("features", start + len(part), len(paths))


def _samples(path: Path, image_size: int | None, batch: int, report: Report) -> Iterator[Tensor]:
    """Parts [n, 3, H, W] fp32 in [0, 1] of the images of an npz file."""
    done, count = 0, count_images(path)
    for part in read_samples(path, batch):
        yield _sized(part.permute(0, 3, 1, 2).float() / 255.0, image_size)
        done += len(part)
        report("features", done, count)


def _image(path: Path, image_size: int | None) -> Tensor:
    try:
        with Image.open(path) as picture:
            pixels = VF.pil_to_tensor(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"expected an image, got {path}: {error}") from error
    return _sized(pixels.float() / 255.0, image_size)


def _sized(images: Tensor, image_size: int | None) -> Tensor:
    """[..., H, W] cropped to the middle square and resized; None leaves them."""
    if image_size is None:
        return images
    square = VF.center_crop(images, [min(images.shape[-2:])] * 2)
    bicubic = VF.InterpolationMode.BICUBIC
    resized = VF.resize(square, [image_size] * 2, interpolation=bicubic, antialias=True)
    # Bicubic weights are negative in places and leave [0, 1] at sharp edges.
    return resized.clamp(0.0, 1.0)
