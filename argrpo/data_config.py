"""Settings of what images are drawn for."""

from dataclasses import dataclass, field
from typing import Literal

from argrpo.text_config import TextEncoderConfig

ClassNames = Literal["imagenet", "imagenet_synsets", "digits"]
"""Whose names, see `argrpo.class_names.class_names`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the images are conditioned on: classes, or prompts from a file or a data set."""

    names: ClassNames = "imagenet"
    """Where class names come from: imagenet has open_clip's, one a class; imagenet_synsets has
    those of the data set itself, where a class has several."""

    aliases: Literal["first", "all"] = "first"
    """Of a class with several names: the first (LOO-FID), or all of them (AR-GRPO)."""

    classes: list[int] | None = None
    """Class ids to train on; None takes all that have a name."""

    template: str = "a photo of a {name}"
    """The text of a class, for judges and policies that read one; AR-GRPO's is a photo of {name}.
    {article} is a, or an before a vowel."""

    prompts: str | None = None
    """Prompts instead of classes: a .json (AR-GRPO's, COCO's captions, a list), .jsonl, .csv, .tsv
    or .txt file, the folder of a data set, or hub:NAME."""

    prompt_column: str | None = None
    """Which column holds the text; None: prompt, text or caption."""

    prompt_split: str = "train"
    """Of a data set."""

    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """What a text-conditional policy reads prompts through."""

    text_features: str | None = None
    """Prompts that are encoded already, instead: a safetensors file with features [P, L, C], mask
    [P, L]; prompts as a JSON list in its metadata."""

    def __post_init__(self) -> None:
        given = {
            "prompts": self.prompts,
            "text_encoder.path": self.text_encoder.path,
        }
        beside = [name for name, value in given.items() if value is not None]
        if self.text_features is not None and beside:
            raise ValueError(
                f"text_features: expected no {beside[0]} beside it, since its prompts are encoded "
                f"already, got {given[beside[0]]}"
            )
        if self.prompts is not None and self.classes is not None:
            raise ValueError(
                f"classes: expected none beside prompts, got {len(self.classes)} of them"
            )
