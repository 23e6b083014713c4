"""Settings of `argrpo sample`."""

from dataclasses import dataclass, field
from typing import Literal

from argrpo.data_config import ClassNames
from argrpo.engine.sampling_params import SamplingParams
from argrpo.text_config import TextEncoderConfig


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw images from a policy."""

    policy: str
    """LlamaGen .pt file, AR-GRPO folder, argrpo folder (a checkpoint, or of argrpo convert),
    or digits:policy."""

    tokenizer: str
    """LlamaGen VQ .pt file, AR-GRPO folder, argrpo folder, or digits:tokenizer."""

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
    """Where encoded texts and the embedded digits models are kept."""

    def __post_init__(self) -> None:
        choices = ("labels", "names", "prompts", "prompts_file", "text_features")
        given = [name for name in choices if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"labels: expected one of {', '.join(choices[:-1])} and {choices[-1]}, "
                f"got {' and '.join(given) or 'none of them'}"
            )
        for name in ("num_images_per_prompt", "decode_batch", "max_slots"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        for name in ("labels", "names", "prompts"):
            if getattr(self, name) == []:
                raise ValueError(f"{name}: expected at least one, got none")
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
