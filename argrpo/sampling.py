"""`argrpo sample`: images of a policy as PNG files, with the tokens that they are made of."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from argrpo.devices import choose_device
from argrpo.drawing_models import load_models
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.image_files import save_grid, save_image
from argrpo.models.image_policy import ImagePolicy
from argrpo.models.pairing import check_guidance
from argrpo.progress import Report, unreported
from argrpo.run_folder import RunFolder, storage_error, write_atomically
from argrpo.sample_config import SampleConfig
from argrpo.sample_prompts import Wanted, wanted_images

_DEFAULT_FOLDER = "samples"
_SLOTS = 64  # images drawn at a time unless told otherwise
_GRID_IMAGES = 128  # more would not be seen one by one, and are not all held in memory


def draw_samples(config: SampleConfig, report: Report = unreported) -> Path:
    """Draw the images and write them, all of them or none; returns their folder.

    Its grid.png shows the first 128.

    Args:
        config: what to draw.
        report: told ("tokens", drawn so far, in all) and ("images", written so far, in all).

    Raises:
        ValueError: a model, a label or a name does not fit; the message names it.
        FileNotFoundError: a path is not there.
        StorageError: the disk is full or refused.
    """
    # Made first, so that one that cannot be written is known before minutes of loading.
    folder = _folder(config)
    try:
        # Before the models, so that an encoder of texts is gone when they come.
        wanted = wanted_images(config, report)
        policy, tokenizer = load_models(
            config, config.policy, choose_device(config.device), setting="policy"
        )
        check_guidance(policy, "guidance_scale", config.guidance_scale)
        _check_kind(config, policy)
        policy.check_conditions(wanted.conditions)
        num_images = len(wanted.names) * config.num_images_per_prompt
        engine = RolloutEngine(policy, max_slots=config.max_slots or min(_SLOTS, num_images))
        with _whole_or_nothing(folder.path) as draft:
            files = _Files(draft, wanted, config.num_images_per_prompt)
            report("images", 0, num_images)
            parts = engine.draw_iter(
                wanted.conditions,
                config.sampling_params(config.guidance_scale),
                seed=config.seed,
                progress=partial(report, "tokens"),
            )
            for part in parts:
                images = tokenizer.decode(part.token_ids, decode_batch=config.decode_batch)
                files.add(images.float().cpu(), part.token_ids.cpu())
                report("images", files.count, num_images)
            files.finish()
    finally:
        folder.discard_if_empty()
    return folder.path


def _check_kind(config: SampleConfig, policy: ImagePolicy) -> None:
    """Refuse labels for a policy of texts and features of texts for one of classes."""
    if policy.config.model_type == "t2i":
        if config.labels is not None or config.names is not None:
            given = "labels" if config.labels is not None else "names"
            raise ValueError(
                f"{given}: expected prompts or prompts_file for {config.policy}, which reads "
                f"texts, got {given}"
            )
    elif config.text_features is not None:
        raise ValueError(
            f"text_features: expected labels or names for {config.policy}, which reads no texts, "
            "got text_features"
        )


def _folder(config: SampleConfig) -> RunFolder:
    if config.output_dir is None:
        return RunFolder.numbered(_DEFAULT_FOLDER)
    folder = RunFolder.create(config.output_dir)
    # Whatever this command may have left, so that no set is mixed with another.
    if (folder.path / "tokens.npy").exists() or any(folder.path.glob("*.png")):
        raise ValueError(
            f"output_dir: expected a folder without samples, got {folder.path}, which holds some; "
            "choose another, or remove it"
        )
    return folder


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A hidden folder within, whose files move up once all of them are written."""
    draft = folder / f".draft.{os.getpid()}"
    try:
        yield draft
        for path in sorted(draft.iterdir()):
            path.rename(folder / path.name)
    except OSError as error:
        raise storage_error(folder, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


class _Files:
    """One PNG file an image, numbered like the rows of tokens.npy, and the first of them as a grid.

    Images are written as they come; only those of the grid are held. prompts.json lists the texts,
    where the prompts are texts.
    """

    def __init__(self, folder: Path, wanted: Wanted, repeats: int) -> None:
        self._folder, self._repeats = folder, repeats
        self._names, self._texts = wanted.names, wanted.texts
        self._token_ids: list[Tensor] = []
        self._shown: list[Tensor] = []
        self.count = 0

    def add(self, images: Tensor, token_ids: Tensor) -> None:
        """Write some images [n, 3, H, W]; keep their tokens [n, T]."""
        self._shown.append(images[: max(0, _GRID_IMAGES - self.count)].clone())
        self._token_ids.append(token_ids)
        for row, image in enumerate(images, start=self.count):
            name = self._names[row // self._repeats]
            save_image(image, self._folder / f"{row:05d}_{name}.png")
        self.count += len(images)

    def finish(self) -> None:
        """Write the grid, the tokens and the texts."""
        columns = self._repeats if len(self._names) > 1 else None
        save_grid(torch.cat(self._shown), self._folder / "grid.png", columns=columns)
        if self._texts is not None:
            texts = json.dumps(self._texts, ensure_ascii=False, indent=1) + "\n"
            write_atomically(
                self._folder / "prompts.json", lambda part: part.write_text(texts, encoding="utf-8")
            )
        token_ids = torch.cat(self._token_ids).numpy()
        write_atomically(self._folder / "tokens.npy", lambda part: np.save(part, token_ids))
