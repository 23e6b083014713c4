"""Settings of `argrpo sample`."""

from dataclasses import dataclass, field

from argrpo.data_config import ClassNames
from argrpo.drawing_config import DrawingConfig
from argrpo.setting_checks import at_least
from argrpo.text_config import TextEncoderConfig


@dataclass(frozen=True, kw_only=True)
class SampleConfig(DrawingConfig):
    """Draw images from a policy."""

    policy: str
    """LlamaGen .pt file, AR-GRPO folder, argrpo folder (a checkpoint, or of argrpo convert),
    or digits:policy."""

    labels: list[int] | None = None
    """Class labels, as --labels 207 360."""

    names: list[str] | None = None
    """Class names instead of labels, as --names "golden retriever" otter."""

    names_from: ClassNames = "imagenet"
    """Which classes the names are of."""

    prompts: list[str] | None = None
    """For a text-conditional policy: texts, as --prompts "a red fox" "two owls"."""

    prompts_file: str | None = None
    """Prompts of a .json, .jsonl, .csv, .tsv or .txt file, a data set's folder, or hub:NAME."""

    prompt_column: str | None = None
    """Which column of prompts_file holds the text; None: prompt, text or caption."""

    prompt_split: str = "train"
    """Of a data set."""

    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """What a text-conditional policy reads prompts through."""

    text_features: str | None = None
    """Prompts that are encoded already, instead: a safetensors file; all of them are drawn."""

    num_images_per_prompt: int = 4
    """Images of each class or text."""

    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 is none."""

    seed: int = 0
    """The same seed and prompts give the same images."""

    output_dir: str | None = None
    """Folder of the images; None: samples, or samples-2, ... when taken."""

    max_slots: int | None = None
    """Images drawn at a time; None: 64, or all if fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = ("labels", "names", "prompts", "prompts_file", "text_features")
        given = [name for name in choices if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"labels: expected one of {', '.join(choices[:-1])} and {choices[-1]}, "
                f"got {' and '.join(given) or 'none of them'}"
            )
        at_least("num_images_per_prompt", self.num_images_per_prompt, 1)
        if self.max_slots is not None:
            at_least("max_slots", self.max_slots, 1)
        for name, values in (
            ("labels", self.labels or []),
            ("num_images_per_prompt", [self.num_images_per_prompt]),
        ):
            large = [value for value in values if abs(value) >= 2**63]
            if large:
                raise ValueError(f"{name}: expected a signed 64-bit integer, got {large[0]}")
        for name in ("labels", "names", "prompts"):
            if getattr(self, name) == []:
                raise ValueError(f"{name}: expected at least one, got none")
        # Refused here and not after minutes of loading.
        self.sampling_params(self.guidance_scale)
