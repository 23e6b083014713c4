"""Prompts, and the only place that turns them into what a policy is conditioned on."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from argrpo.data_config import DataConfig
from argrpo.engine.conditions import Conditions, TextFeatures

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an image was asked to show."""

    text: str
    class_id: int | None = None
    prompt_id: int = 0
    """Which prompt of the data set; images of one prompt form a group."""
    reference_image: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PromptSet:
    """All prompts of a run and the features of their texts, if the policy reads any."""

    prompts: list[Prompt]
    features: TextFeatures | None = None

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
        ids = torch.tensor([prompt.prompt_id for prompt in prompts]).repeat_interleave(repeats)
        if self.features is not None:
            return TextFeatures(self.features.features, self.features.mask, ids)
        labels = [prompt.class_id for prompt in prompts]
        return torch.tensor(labels, dtype=torch.int64).repeat_interleave(repeats)


def load_prompts(config: DataConfig) -> PromptSet:
    """The prompts that a config names.

    Raises:
        ValueError: a class id without a name, or a features file without what it needs.
        FileNotFoundError: the features file is missing.
    """
    if config.text_features is not None:
        return _load_text_features(Path(config.text_features))
    names = class_names(config.names)
    classes = list(range(len(names))) if config.classes is None else config.classes
    outside = [c for c in classes if not 0 <= c < len(names)]
    if outside or not classes:
        raise ValueError(
            f"data.classes: expected ids from 0 to {len(names) - 1}, "
            f"got {outside[0] if outside else 'none'}"
        )
    return PromptSet(
        [
            Prompt(config.template.format(name=names[c]), class_id=c, prompt_id=i)
            for i, c in enumerate(classes)
        ]
    )


def class_names(source: str) -> list[str]:
    """Names by class id, from a library's metadata where one has them."""
    if source == "digits":
        return list(DIGIT_NAMES)
    from open_clip import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def _load_text_features(path: Path) -> PromptSet:
    if not path.is_file():
        raise FileNotFoundError(f"data.text_features: expected a file, got {path}")
    wanted = (
        "data.text_features: expected a safetensors file with features [P, L, C], mask [P, L] and "
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
    return PromptSet(prompts, features)
