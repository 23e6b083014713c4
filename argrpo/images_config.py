"""Settings that `argrpo eval c2i` and `argrpo eval t2i` share: which policies draw, and how."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from argrpo.drawing_config import DrawingConfig
from argrpo.setting_checks import at_least


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(DrawingConfig):
    """Policies, what they draw together, and where the images go."""

    policy: str | None = None
    """LlamaGen .pt file, AR-GRPO folder, argrpo folder (a checkpoint, or of argrpo convert),
    or digits:policy."""

    compare: list[str] = field(default_factory=list)
    """Policies to evaluate side by side instead, as --compare base.pt runs/x/checkpoints/best; the
    first is the base. They draw with the same seeds and conditions."""

    seed: int = 0
    """An image depends on it and on its number, not on who draws it."""

    pixels: Literal["llamagen", "truncate", "round"] = "llamagen"
    """How a value y in [0, 1] becomes one of 256 levels: floor(255 y + 1/2), floor(255 y), or
    255 y rounded to even. Judges and networks see the levels."""

    output_dir: str = "evaluation"
    """Folder of images, numbers and what is needed to go on after an interruption."""

    batch: int = 64
    """Images drawn together. Part of what an image is: libraries round another number of rows in
    another way."""

    shard: int = 0
    """Which share of the batches this process draws, 0 to num_shards - 1; torchrun's processes
    share them by rank instead. The last to finish measures."""

    num_shards: int = 1
    """Processes that draw into the same output_dir."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.policy is None) == (not self.compare):
            raise ValueError(
                "policy: expected either policy or compare, got "
                f"{'neither' if self.policy is None else 'both'}"
            )
        at_least("batch", self.batch, 1)
        at_least("num_shards", self.num_shards, 1)
        if not 0 <= self.shard < self.num_shards:
            raise ValueError(
                f"shard: expected 0 to num_shards - 1 = {self.num_shards - 1}, got {self.shard}"
            )

    @property
    def policies_setting(self) -> str:
        """The setting that `policies` are read from."""
        return "compare" if self.compare else "policy"

    @property
    def policies(self) -> dict[str, str]:
        """Paths by name, of which no two are alike: the last part of a path, numbered where it
        comes twice."""
        paths = self.compare or [str(self.policy)]
        stems = [Path(path.removeprefix("digits:")).stem for path in paths]
        names = [
            stem if stems.count(stem) == 1 else f"{stem}_{place}"
            for place, stem in enumerate(stems, start=1)
        ]
        if len(set(names)) < len(names):  # of best_2, a/best and b/best
            names = [f"{place}_{stem}" for place, stem in enumerate(stems, start=1)]
        return dict(zip(names, paths, strict=True))


def check_scales(setting: str, scales: list[float]) -> None:
    """Refuse scales that no draw has, or that come twice.

    Raises:
        ValueError: as said, under the name of the setting.
    """
    if not scales or not all(1 <= scale < math.inf for scale in scales):
        raise ValueError(
            f"{setting}: expected finite numbers of at least 1, got {scales or 'none'}"
        )
    if len(set(scales)) < len(scales):
        raise ValueError(f"{setting}: expected each once, got {scales}")
