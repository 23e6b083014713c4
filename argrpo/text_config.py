"""Settings of the encoder that turns prompts into features."""

from dataclasses import dataclass
from typing import Literal

Cleaning = Literal["llamagen", "lower", "none"]
"""What happens to a prompt before it is encoded, see `argrpo.text_cleaning.clean`."""


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Which encoder reads the prompts of a text-conditional policy, and how."""

    path: str | None = None
    """Folder or hub id of a T5, as google/flan-t5-xl, which LlamaGen's text policies were trained
    on; digits:text_encoder is the embedded one."""

    cleaning: Cleaning = "llamagen"
    """What happens to a prompt first: llamagen as in its training (lower case, no addresses, no
    Chinese, ...), lower only makes lower case, none leaves it."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the encoder and of the features."""

    batch: int = 16
    """Prompts encoded at a time; bounds memory."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch: expected at least 1, got {self.batch}")
