"""Prompts, and the only place that turns them into what a policy is conditioned on."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from argrpo.class_names import class_texts
from argrpo.data_config import DataConfig
from argrpo.engine.conditions import Conditions, TextFeatures
from argrpo.image_files import read_image
from argrpo.model_paths import blamed_on
from argrpo.prompt_files import read_rows


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an image was asked to show."""

    text: str
    class_id: int | None = None
    prompt_id: int = 0
    """Which prompt of the data set; images of one prompt form a group."""
    reference_image: Tensor | None = None  # [3, H, W] in [0, 1], for judges that compare
    reference_path: Path | None = None  # of a picture that is read when it is asked for

    @property
    def has_reference(self) -> bool:
        return self.reference_image is not None or self.reference_path is not None

    def reference(self) -> Tensor | None:
        """[3, H, W] in [0, 1] of any size; None without one.

        Raises:
            UnreadableImageError: the file is no picture, or not there any more.
        """
        if self.reference_image is not None or self.reference_path is None:
            return self.reference_image
        return read_image(self.reference_path, "reference_image")


class Texts(Protocol):
    """The features of all prompts of a run."""

    def conditions(self, rows: Tensor) -> TextFeatures:
        """Conditions of images, whose prompts are `rows` [N] int64."""
        ...

    def probe(self) -> TextFeatures:
        """Conditions that fit a policy only if all do; the longest are among them."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PaddedTexts:
    """Features that came padded, from a file."""

    features: TextFeatures

    def conditions(self, rows: Tensor) -> TextFeatures:
        return TextFeatures(self.features.features, self.features.mask, rows)

    def probe(self) -> TextFeatures:
        return self.features


@dataclass(frozen=True, slots=True, eq=False)
class PromptSet:
    """All prompts of a run and the features of their texts, if the policy reads any."""

    prompts: list[Prompt]
    texts: Texts | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def draw(self, count: int, seed: int, step: int) -> list[Prompt]:
        """The prompts of a step: consecutive stretches of one endless shuffled sequence.

        Every prompt comes once before any comes again. Depends on (seed, step) alone, so a run
        that starts again at a step sees the same prompts.
        """
        first, last = step * count, (step + 1) * count
        size = len(self.prompts)
        rows: list[int] = []
        for epoch in range(first // size, -(-last // size)):
            begin, end = max(first - epoch * size, 0), min(last - epoch * size, size)
            rows += self._shuffled(seed, epoch)[begin:end]
        return [self.prompts[row] for row in rows]

    def _shuffled(self, seed: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(len(self.prompts), generator=generator).tolist()

    def conditions(self, prompts: list[Prompt], repeats: int) -> Conditions:
        """Conditions of `repeats` consecutive images of each prompt, in order."""
        if self.texts is not None:
            ids = torch.tensor([prompt.prompt_id for prompt in prompts])
            return self.texts.conditions(ids.repeat_interleave(repeats))
        labels = [_label(prompt) for prompt in prompts]
        return torch.tensor(labels, dtype=torch.int64).repeat_interleave(repeats)

    def probe(self) -> Conditions:
        """Conditions that fit a policy only if all of this set do; the longest are among them."""
        return self.conditions(self.prompts, 1) if self.texts is None else self.texts.probe()


def load_prompts(config: DataConfig) -> PromptSet:
    """The prompts that a config names, with their features if those came encoded.

    `argrpo.run_prompts.load_run_prompts` encodes the others.

    Raises:
        ValueError: a class id without a name, a row without text, or a features file without what
            it needs.
        FileNotFoundError: a file is missing.
    """
    if config.text_features is not None:
        return load_text_features(Path(config.text_features), "data.text_features")
    if config.prompts is not None:
        with blamed_on("data.prompts"):
            rows = read_rows(config.prompts, column=config.prompt_column, split=config.prompt_split)
        return PromptSet(
            [
                Prompt(row.text, row.class_id, i, reference_path=row.reference_image)
                for i, row in enumerate(rows)
            ]
        )
    texts = class_texts(config)
    return PromptSet([Prompt(text, c, prompt_id=i) for i, (c, text) in enumerate(texts)])


def _label(prompt: Prompt) -> int:
    if prompt.class_id is None:
        raise ValueError(
            "data.prompts: expected a class_id with each prompt for a class-conditional policy, "
            f"got none with {prompt.text[:80]!r}"
        )
    return prompt.class_id


def load_text_features(path: Path, setting: str) -> PromptSet:
    """Prompts that came encoded.

    Args:
        path: a safetensors file with features [P, L, C], mask [P, L] and the prompts.
        setting: which one the path comes from, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks something; named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{setting}: expected a file, got {path}")
    wanted = (
        f"{setting}: expected a safetensors file with features [P, L, C], mask [P, L] and "
        f"prompts, a JSON list of P strings, in its metadata; got {path}"
    )
    try:
        with safe_open(path, framework="pt") as file:
            texts = json.loads((file.metadata() or {}).get("prompts", "[]"))
            missing = {"features", "mask"} - set(file.keys())
            if missing:
                raise ValueError(f"{wanted} without {', '.join(sorted(missing))}")
            features = TextFeatures(file.get_tensor("features"), file.get_tensor("mask"))
    except SafetensorError as error:
        raise ValueError(f"{wanted}, which cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{wanted}, whose prompts are no JSON: {error}") from error
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{wanted}, whose prompts are no list of strings")
    if len(texts) != len(features.features):
        raise ValueError(
            f"{wanted} with {len(texts)} prompts for {len(features.features)} features"
        )
    prompts = [Prompt(text, prompt_id=i) for i, text in enumerate(texts)]
    return PromptSet(prompts, PaddedTexts(features))
