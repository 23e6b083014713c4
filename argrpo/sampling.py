"""`argrpo sample`: images of a policy as PNG files, with the tokens that they are made of."""

import difflib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from argrpo.class_names import class_names
from argrpo.data import load_prompts
from argrpo.data_config import ClassNames, DataConfig
from argrpo.devices import DTYPES, choose_device
from argrpo.engine.conditions import Conditions
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.image_files import save_grid, save_image
from argrpo.model_paths import blamed_on, resolve_path
from argrpo.models.image_policy import ImagePolicy
from argrpo.models.loading import load_policy, load_tokenizer
from argrpo.models.pairing import check_guidance, check_pair
from argrpo.models.vq import VQTokenizer
from argrpo.progress import Report, unreported
from argrpo.run_folder import RunFolder, storage_error, write_atomically

_DEFAULT_FOLDER = "samples"
_SLOTS = 64  # images drawn at a time unless told otherwise
_GRID_IMAGES = 128  # more would not be seen one by one, and are not all held in memory


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw images from a policy."""

    policy: str
    """LlamaGen .pt file, AR-GRPO folder, argrpo folder such as a checkpoint, or digits:policy."""

    tokenizer: str
    """LlamaGen VQ .pt file, AR-GRPO folder, argrpo folder, or digits:tokenizer."""

    labels: list[int] | None = None
    """Class labels, as --labels 207 360."""

    names: list[str] | None = None
    """Class names instead of labels, as --names "golden retriever" otter."""

    names_from: ClassNames = "imagenet"
    """Which classes the names are of."""

    text_features: str | None = None
    """For a text-conditional policy: safetensors file of encoded prompts; all of them are drawn."""

    num_images_per_prompt: int = 4
    """Images of each class or text."""

    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""

    guidance_interval: int | None = None
    """Guide tokens 0 to guidance_interval + 1 only; None guides all."""

    temperature: float = 1.0
    """0 always takes the likeliest token."""

    top_k: int = 0
    """Draw from the k likeliest tokens; 0 keeps all."""

    top_p: float = 1.0
    """Draw from the likeliest tokens up to this mass, after top_k; 1 keeps all."""

    seed: int = 0
    """The same seed and prompts give the same images."""

    output_dir: str | None = None
    """Folder of the images; None: samples, or samples-2, ... when taken."""

    image_size: int | None = None
    """Pixels a side; required where the policy's file does not say."""

    num_heads: int | None = None
    """Attention heads; required for widths that no published policy has."""

    downsample: int = 16
    """Pixels a side of one token, where the policy's file does not say."""

    text_padding: Literal["left", "right"] | None = None
    """Where padding stands in the texts; None: as the policy's folder says, else left."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""

    max_slots: int | None = None
    """Images drawn at a time; None: 64, or all if fewer."""

    decode_batch: int = 16
    """Images decoded at a time; bounds memory."""

    cache_dir: str | None = None
    """Where the embedded digits models are kept."""

    def __post_init__(self) -> None:
        given = [self.labels, self.names, self.text_features]
        if sum(choice is not None for choice in given) != 1:
            raise ValueError(
                "labels: expected one of labels, names and text_features, "
                f"got {sum(choice is not None for choice in given)} of them"
            )
        for name in ("num_images_per_prompt", "decode_batch", "max_slots"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        for name in ("labels", "names"):
            if getattr(self, name) == []:
                raise ValueError(f"{name}: expected at least one class, got none")
        # Refused here and not after minutes of loading.
        self.sampling_params()

    def sampling_params(self) -> SamplingParams:
        """The distribution to draw from."""
        return SamplingParams(
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


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
    policy, tokenizer = _models(config)
    conditions, names = _conditions(config)
    policy.check_conditions(conditions)
    num_images = len(names) * config.num_images_per_prompt
    engine = RolloutEngine(policy, max_slots=config.max_slots or min(_SLOTS, num_images))
    # Made before the draw, so that a folder that cannot be written is known at once.
    folder = _folder(config)
    try:
        with _whole_or_nothing(folder.path) as draft:
            files = _Files(draft, names, config.num_images_per_prompt)
            report("images", 0, num_images)
            parts = engine.draw_iter(
                conditions,
                config.sampling_params(),
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


def labels_of(names: list[str], source: ClassNames) -> list[int]:
    """Class labels of class names, in order; case and spaces around them do not matter.

    Raises:
        ValueError: no class, or more than one, has a name; close ones are listed.
    """
    known = [name.casefold() for name in class_names(source)]
    return [_label_of(name, known, source) for name in names]


def _models(config: SampleConfig) -> tuple[ImagePolicy, VQTokenizer]:
    device, dtype = choose_device(config.device), DTYPES[config.dtype]
    with blamed_on("policy"):
        policy = load_policy(
            resolve_path(config.policy, config.cache_dir),
            image_size=config.image_size,
            num_heads=config.num_heads,
            downsample=config.downsample,
            text_padding=config.text_padding,
            device=device,
            dtype=dtype,
        )
    with blamed_on("tokenizer"):
        tokenizer_path = resolve_path(config.tokenizer, config.cache_dir)
        tokenizer = load_tokenizer(tokenizer_path, device=device, dtype=dtype)
    check_pair(policy, tokenizer)
    check_guidance(policy, "guidance_scale", config.guidance_scale)
    return policy, tokenizer


def _label_of(name: str, known: list[str], source: str) -> int:
    wanted = name.strip().casefold()
    found = [label for label, candidate in enumerate(known) if candidate == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        labels = ", ".join(map(str, found))
        raise ValueError(f"names: expected one class, got {name!r}, which labels {labels} share")
    close = difflib.get_close_matches(wanted, known, n=5, cutoff=0.5)
    close += [candidate for candidate in known if wanted and wanted in candidate][:5]
    hint = f"; close: {', '.join(dict.fromkeys(close))}" if close else ""
    raise ValueError(f"names: expected a class of {source}, got {name!r}{hint}")


def _conditions(config: SampleConfig) -> tuple[Conditions, list[str]]:
    """The condition of each image, images of one prompt in a row, and each prompt's file name."""
    repeats = config.num_images_per_prompt
    if config.text_features is not None:
        texts = load_prompts(DataConfig(text_features=config.text_features))
        names = [f"prompt_{index:05d}" for index in range(len(texts))]
        return texts.conditions(texts.prompts, repeats), names
    labels = config.labels
    if labels is None:
        labels = labels_of(config.names or [], config.names_from)
    names = [f"class_{label:04d}" for label in labels]
    return torch.tensor(labels, dtype=torch.int64).repeat_interleave(repeats), names


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

    Images are written as they come; only those of the grid are held.
    """

    def __init__(self, folder: Path, names: list[str], repeats: int) -> None:
        self._folder, self._names, self._repeats = folder, names, repeats
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
        """Write the grid and the tokens."""
        columns = self._repeats if len(self._names) > 1 else None
        save_grid(torch.cat(self._shown), self._folder / "grid.png", columns=columns)
        token_ids = torch.cat(self._token_ids).numpy()
        write_atomically(self._folder / "tokens.npy", lambda part: np.save(part, token_ids))
