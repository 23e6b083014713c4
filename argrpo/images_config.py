"""Settings that `argrpo eval c2i` and `argrpo eval t2i` share: which policies draw, and how."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from argrpo.engine.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Policies, how they draw, and where the images go."""

    tokenizer: str
    """LlamaGen VQ .pt file, AR-GRPO folder, argrpo folder, or digits:tokenizer."""

    policy: str | None = None
    """LlamaGen .pt file, AR-GRPO folder, argrpo folder (a checkpoint, or of argrpo convert),
    or digits:policy."""

    compare: list[str] = field(default_factory=list)
    """Policies to evaluate side by side instead, as --compare base.pt runs/x/checkpoints/best; the
    first is the base. They draw with the same seeds and conditions."""

    guidance_interval: int | None = None
    """Guide tokens 0 to guidance_interval + 1 only; None guides all."""

    temperature: float = 1.0
    """0 always takes the likeliest token."""

    top_k: int = 0
    """Draw from the k likeliest tokens; 0 keeps all."""

    top_p: float = 1.0
    """Draw from the likeliest tokens up to this mass, after top_k; 1 keeps all."""

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

    decode_batch: int = 16
    """Images decoded at a time; bounds memory."""

    shard: int = 0
    """Which share of the batches this process draws, 0 to num_shards - 1; torchrun's processes
    share them by rank instead. The last to finish measures."""

    num_shards: int = 1
    """Processes that draw into the same output_dir."""

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

    cache_dir: str | None = None
    """Where the embedded digits models are kept."""

    def __post_init__(self) -> None:
        if (self.policy is None) == (not self.compare):
            raise ValueError(
                "policy: expected either policy or compare, got "
                f"{'neither' if self.policy is None else 'both'}"
            )
        for name in ("batch", "decode_batch", "num_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.shard < self.num_shards:
            raise ValueError(
                f"shard: expected 0 to num_shards - 1 = {self.num_shards - 1}, got {self.shard}"
            )

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

    def sampling_params(self, guidance_scale: float) -> SamplingParams:
        """The distribution to draw from."""
        return SamplingParams(
            guidance_scale=guidance_scale,
            guidance_interval=self.guidance_interval,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


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
