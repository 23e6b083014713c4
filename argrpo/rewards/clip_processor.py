"""What the processor's file of a CLIP of transformers asks of pictures, as pixels of a tower.

    size        shortest_edge, with a crop; or height and width, the same, without
    crop_size   a side, as long as those of the images that the tower takes
    resample    2 or 3 of Pillow's, bilinear or bicubic

transformers 5 writes it to processor_config.json under image_processor where it saves a whole
processor, else to preprocessor_config.json; 4 wrote that, some of its versions with a number where
a record stands now.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from argrpo.rewards.tower_pixels import OPENAI_MEAN, OPENAI_STD, Interpolation, TowerPixels

FILES = ("processor_config.json", "preprocessor_config.json")
_RESAMPLE: Mapping[int, Interpolation] = {2: "bilinear", 3: "bicubic"}
_ALWAYS = ("do_resize", "do_rescale")


def processor_pixels(model: str, side: int) -> TowerPixels:
    """The pixels that a tower wants to see.

    Args:
        model: a folder, or a name of the hub; a folder may have no file: then all is as OpenAI's.
        side: of the images that the tower takes.

    Raises:
        ValueError: the file asks for something that is not done here, named.
        OSError: it cannot be had.
    """
    folder = Path(model)
    if folder.is_dir() and not any((folder / name).is_file() for name in FILES):
        return pixels_of({}, side)
    from transformers import CLIPImageProcessor

    said, _ = CLIPImageProcessor.get_image_processor_dict(model, local_files_only=folder.is_dir())
    return pixels_of(said, side)


def pixels_of(said: Mapping[str, Any], side: int) -> TowerPixels:
    """The pixels that a processor's record describes.

    Args:
        said: as its file; what is missing is as OpenAI's, for a tower of this size.
        side: of the images that the tower takes.

    Raises:
        ValueError: a key asks for something that is not done here.
    """
    for key in _ALWAYS:
        if not said.get(key, True):
            raise ValueError(f"{key}: expected true in the processor's file, got false")
    factor = said.get("rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise ValueError(f"rescale_factor: expected 1 / 255 in the processor's file, got {factor}")
    resample = said.get("resample", 3)
    if resample not in _RESAMPLE:
        raise ValueError(
            f"resample: expected 2 or 3, bilinear or bicubic, in the processor's file, got "
            f"{resample}"
        )
    is_normalised = said.get("do_normalize", True)
    mean, std = (
        tuple(said.get(key, published)) if is_normalised else (plain,) * 3
        for key, published, plain in (
            ("image_mean", OPENAI_MEAN, 0.0),
            ("image_std", OPENAI_STD, 1.0),
        )
    )
    shorter = _shorter(said, side)
    return TowerPixels(
        side,
        mean,
        std,
        _RESAMPLE[resample],
        squash=shorter is None,
        shorter=shorter,
        crop_from="floor",
    )


def _shorter(said: Mapping[str, Any], side: int) -> int | None:
    """The shorter side that pictures are resized to; None where both become `side`."""
    size, crop = _record(said.get("size", side)), _record(said.get("crop_size", side))
    is_cropped = said.get("do_center_crop", True)
    if is_cropped and set(crop.values()) != {side}:
        raise ValueError(
            f"crop_size: expected the {side} pixels of the tower in the processor's file, got "
            f"{said['crop_size']}"
        )
    if size.keys() == {"shortest_edge"} and is_cropped and size["shortest_edge"] >= side:
        return size["shortest_edge"]
    if size.keys() == {"height", "width"} and set(size.values()) == {side}:
        return None
    with_crop = "with" if is_cropped else "without"
    raise ValueError(
        f"size: expected in the processor's file a shortest_edge of {side} or more pixels with a "
        f"crop, or a height and a width of {side}, got {said.get('size')} {with_crop} a crop"
    )


def _record(size: Any) -> dict[str, int]:
    """A size as transformers 5 writes it; a number was a shortest edge, or the side of a crop."""
    if not isinstance(size, Mapping):
        return {"shortest_edge": int(size)}
    return {key: value for key, value in size.items() if value is not None}
