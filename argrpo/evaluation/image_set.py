"""One set of generated images on disk, made a batch at a time by any number of processes.

Image i belongs to batch i // batch. A batch is drawn, decoded and looked at as a whole: libraries
round a product of one shape in one way, so who makes a batch, and what was made before it, changes
no bit of it (on one kind of machine). Its files appear whole or not at all, so a set that was
interrupted goes on where it stopped.

    settings.json                 what the images depend on; another set is refused
    batches/000012.safetensors    pixels and entropies of a batch, until all are there
    views/NAME/000012.safetensors what the network or the judges NAME say of them
    samples.npz                   all images, for us and for ADM's evaluator

Shapes: N images, n of a batch.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from argrpo.evaluation.features import FeatureExtractor, Views
from argrpo.evaluation.sample_files import read_samples, write_samples
from argrpo.evaluation.sharing import Share
from argrpo.run_folder import write_atomically

_ENTROPIES = "entropies"


@dataclass(frozen=True, slots=True, eq=False)  # eq would compare tensors
class DrawnBatch:
    """What drawing a batch gives."""

    pixels: Tensor  # [n, H, W, 3] uint8
    entropies: Tensor  # [n] fp32, nats a token, of the distribution drawn from


class Look(Protocol):
    """Something that has to be known of each image."""

    @property
    def name(self) -> str:
        """Equal names see alike."""
        ...

    def __call__(self, rows: range, images: Tensor) -> dict[str, Tensor]:
        """The images of some rows, [n, 3, H, W] fp32 in [0, 1] -> tensors of n rows."""
        ...


@dataclass(frozen=True, slots=True)
class NetworkLook:
    """All that a network says of images."""

    extractor: FeatureExtractor

    @property
    def name(self) -> str:
        return self.extractor.name

    def __call__(self, rows: range, images: Tensor) -> dict[str, Tensor]:
        views = self.extractor.views(images)
        found = {field.name: getattr(views, field.name) for field in fields(Views)}
        return {name: value for name, value in found.items() if value is not None}


class ImageSet:
    """A folder of N images.

    Args:
        folder: made if need be.
        num_images: N.
        batch: images made at a time.
        settings: all that the images depend on, as JSON has it.

    Raises:
        ValueError: the folder holds images of other settings; the first of them is named.
        StorageError: the disk is full or refused.
    """

    def __init__(
        self, folder: Path, num_images: int, batch: int, settings: Mapping[str, Any]
    ) -> None:
        self.folder, self.num_images, self._batch = folder, num_images, batch
        _claim(folder, {"num_images": num_images, "batch": batch, **settings})

    @property
    def samples_path(self) -> Path:
        """The file of all images."""
        return self.folder / "samples.npz"

    @property
    def num_batches(self) -> int:
        return -(-self.num_images // self._batch)

    def rows(self, place: int) -> range:
        """The images of a batch."""
        return range(place * self._batch, min((place + 1) * self._batch, self.num_images))

    def missing(self, looks: Sequence[Look] = ()) -> list[int]:
        """Batches that are not drawn yet, or not looked at by all that should."""
        is_finished = self.samples_path.is_file()
        return [
            place
            for place in range(self.num_batches)
            if not (is_finished or self._batch_path(place).is_file())
            or not all(self._views_path(look, place).is_file() for look in looks)
        ]

    def make(
        self,
        draw: Callable[[range], DrawnBatch],
        looks: Sequence[Look],
        share: Share,
        progress: Callable[[int, int], None],
    ) -> None:
        """Draw and look at what is missing of a share of the batches.

        Args:
            draw: makes the images of some rows.
            looks: at each of them.
            share: which batches are this process's own.
            progress: told (batches done, batches to do).
        """
        places = share.of(self.missing(looks))
        if self.samples_path.is_file():
            # In one pass, because the file is read from its start.
            for done, (place, pixels) in enumerate(self._pixels(set(places)), start=1):
                for look in looks:
                    self._see(look, place, pixels)
                progress(done, len(places))
            return
        for done, place in enumerate(places, start=1):
            if not self._batch_path(place).is_file():
                drawn = draw(self.rows(place))
                tensors = {"pixels": drawn.pixels.contiguous(), _ENTROPIES: drawn.entropies}
                _save(self._batch_path(place), tensors)
            for look in looks:
                self._look(look, {place})
            progress(done, len(places))

    def _look(self, look: Look, places: set[int]) -> None:
        """Look at those of the batches that were not looked at yet."""
        unseen = {place for place in places if not self._views_path(look, place).is_file()}
        for place, pixels in self._pixels(unseen):
            self._see(look, place, pixels)

    def _see(self, look: Look, place: int, pixels: Tensor) -> None:
        """Keep what is seen of a batch; nothing if that is done."""
        path = self._views_path(look, place)
        if path.is_file():
            return
        found = look(self.rows(place), pixels.permute(0, 3, 1, 2).float() / 255.0)
        _save(path, {name: value.cpu().contiguous() for name, value in found.items()})

    def finish(self, others: Mapping[str, np.ndarray]) -> None:
        """Put all batches into samples.npz, with arrays beside them; nothing if that is done.

        Of two processes at once one waits for the other.
        """
        with (self.folder / ".finish.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.samples_path.is_file():
                self._write_samples(others)
            shutil.rmtree(self.folder / "batches", ignore_errors=True)

    def _write_samples(self, others: Mapping[str, np.ndarray]) -> None:
        batches = range(self.num_batches)
        entropies = [load_file(self._batch_path(place))[_ENTROPIES] for place in batches]
        parts = (load_file(self._batch_path(place))["pixels"] for place in batches)
        everything = {**others, _ENTROPIES: torch.cat(entropies).numpy()}
        write_samples(self.samples_path, parts, self.num_images, everything)

    def seen(self, look: Look) -> dict[str, Tensor]:
        """What was seen of all images, in order, on the CPU."""
        batches = range(self.num_batches)
        self._look(look, set(batches))
        parts = [load_file(self._views_path(look, place)) for place in batches]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def entropies(self) -> Tensor:
        """[N] fp32, of a set that is finished."""
        with np.load(self.samples_path) as file:
            return torch.from_numpy(file[_ENTROPIES])

    def batches(self) -> Iterator[tuple[range, Tensor]]:
        """The rows and pixels [n, H, W, 3] of every batch, in order."""
        for place, pixels in self._pixels(set(range(self.num_batches))):
            yield self.rows(place), pixels

    def _pixels(self, places: set[int]) -> Iterator[tuple[int, Tensor]]:
        if places and self.samples_path.is_file():
            parts = enumerate(read_samples(self.samples_path, self._batch))
            wanted = islice(parts, max(places) + 1)
            yield from ((place, pixels) for place, pixels in wanted if place in places)
            return
        for place in sorted(places):
            yield place, load_file(self._batch_path(place))["pixels"]

    def _batch_path(self, place: int) -> Path:
        return self.folder / "batches" / f"{place:06d}.safetensors"

    def _views_path(self, look: Look, place: int) -> Path:
        return self.folder / "views" / look.name / f"{place:06d}.safetensors"


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    write_atomically(path, lambda part: save_file(tensors, part))


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings, or find the same ones there."""
    path, wanted = folder / "settings.json", json.dumps(settings, indent=2) + "\n"
    if not path.is_file():
        write_atomically(path, lambda part: part.write_text(wanted))
        return
    found, asked = json.loads(path.read_text()), json.loads(wanted)
    for name in [*asked, *found]:
        if found.get(name) != asked.get(name):
            raise ValueError(
                f"output_dir: expected a folder without images or with those of the same settings, "
                f"got {folder}, whose {name} is {found.get(name)} and not {asked.get(name)}; "
                "choose another, or remove it"
            )
