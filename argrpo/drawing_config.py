"""Settings of every command that draws and does not train: how models are read and drawn from."""

from dataclasses import dataclass
from typing import Literal

from argrpo.engine.sampling_params import SamplingParams
from argrpo.setting_checks import at_least


@dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """The tokenizer, what no weight says of a policy, and the distribution to draw from."""

    tokenizer: str
    """LlamaGen VQ .pt file, AR-GRPO folder, argrpo folder, or digits:tokenizer."""

    image_size: int | None = None
    """Pixels a side; required where a policy's file does not say."""

    num_heads: int | None = None
    """Attention heads; required for widths that no published policy has."""

    downsample: int = 16
    """Pixels a side of one token, where a policy's file does not say."""

    text_padding: Literal["left", "right"] | None = None
    """Where padding stands in the texts; None: as a policy's folder says, else left."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where there is one."""

    guidance_interval: int | None = None
    """Guide tokens 0 to guidance_interval + 1 only; None guides all."""

    temperature: float = 1.0
    """0 always takes the likeliest token."""

    top_k: int = 0
    """Draw from the k likeliest tokens; 0 keeps all."""

    top_p: float = 1.0
    """Draw from the likeliest tokens up to this mass, after top_k; 1 keeps all."""

    decode_batch: int = 16
    """Images decoded at a time; bounds memory."""

    cache_dir: str | None = None
    """Where encoded texts and the embedded digits models are kept."""

    def __post_init__(self) -> None:
        at_least("decode_batch", self.decode_batch, 1)

    def sampling_params(self, guidance_scale: float) -> SamplingParams:
        """The distribution to draw from.

        Raises:
            ValueError: there is none; the setting is named.
        """
        return SamplingParams(
            guidance_scale=guidance_scale,
            guidance_interval=self.guidance_interval,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )
