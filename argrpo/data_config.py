"""Settings of what images are drawn for."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the images are conditioned on."""

    names: Literal["imagenet", "digits"] = "imagenet"
    """Where class names come from."""

    classes: list[int] | None = None
    """Class ids to train on; None takes all that have a name."""

    template: str = "a photo of a {name}"
    """The text of a class, for judges that read one."""

    text_features: str | None = None
    """safetensors file of encoded prompts for a text-conditional policy: features [P, L, C], mask
    [P, L]; prompts as a JSON list in its metadata."""
