"""Settings of what a run leaves behind."""

from dataclasses import dataclass, field
from typing import Literal

from argrpo.setting_checks import at_least


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves behind, and how often. A step is one rollout iteration."""

    sample_every: int = 20
    """Steps between grids of fixed seed; 0 draws only the first and the last."""

    sample_images: int = 20
    """Images of a grid."""

    save_every: int = 100
    """Steps between checkpoints; 0 saves only the last."""

    keep_last: int | None = None
    """Checkpoints that stay, of the newest; None keeps all. One takes about four times the bytes of
    the fp32 weights."""

    keep_every: int | None = None
    """Checkpoints of steps that this divides stay too, however old."""

    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(
        default_factory=lambda: ["tensorboard"]
    )
    """Beside metrics.jsonl, which is always written."""

    def __post_init__(self) -> None:
        at_least("output.sample_every", self.sample_every, 0)
        at_least("output.sample_images", self.sample_images, 1)
        at_least("output.save_every", self.save_every, 0)
        if self.keep_last is not None:
            at_least("output.keep_last", self.keep_last, 1)
        if self.keep_every is not None:
            at_least("output.keep_every", self.keep_every, 1)
            if self.keep_last is None:
                raise ValueError(
                    "output.keep_every: expected output.keep_last with it, which removes the "
                    "others, got none"
                )
