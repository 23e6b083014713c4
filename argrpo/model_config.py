"""Settings of the two models of a run: the policy and the tokenizer."""

from dataclasses import dataclass
from typing import Literal

from argrpo.models.attention_backends import AttentionName
from argrpo.setting_checks import at_least


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Which model is tuned."""

    path: str
    """LlamaGen .pt file, AR-GRPO folder, argrpo folder (a checkpoint, or of argrpo convert);
    digits:policy is the embedded one."""

    image_size: int | None = None
    """Pixels a side; required where the file does not say, refused where it says otherwise."""

    num_heads: int | None = None
    """Attention heads; known for the published widths, required for any other."""

    downsample: int = 16
    """Pixels a side of one token."""

    text_padding: Literal["left", "right"] | None = None
    """Where padding stands in the texts of a text-conditional policy: left (LlamaGen) or right
    (AR-GRPO); None takes what the folder says, and left where it says nothing. With right, the
    features of a padded last position are read as they stand; LlamaGen's sampler puts 0 there."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the working weights; masters, gradients and optimizer state are always fp32."""

    attention: AttentionName = "sdpa"
    """Of the training forward: PyTorch's, or a package of the extra `attention` (a GPU; flash_attn
    in bfloat16 alone)."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which decoder turns tokens into images."""

    path: str
    """LlamaGen VQ .pt file, AR-GRPO folder or argrpo folder; digits:tokenizer is embedded."""

    decode_batch: int = 16
    """Images decoded at a time; bounds memory."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""

    pixels: Literal["float", "llamagen", "truncate", "round"] = "float"
    """How rewards see pixels: as decoded, or through the 8 bits of a file."""

    def __post_init__(self) -> None:
        at_least("tokenizer.decode_batch", self.decode_batch, 1)
