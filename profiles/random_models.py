"""Models to profile: the published sizes with random weights, and a tiny one for a CPU.

Time does not depend on what the weights say, so no file has to be fetched. Sizes are those of
FoundationVision/LlamaGen at ce98ec4, autoregressive/models/gpt.py.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import save_policy, save_tokenizer
from argrpo.models.vq import VQConfig, VQTokenizer

REWARD = "random_models:brightness"


@dataclass(frozen=True)
class Sizes:
    """Of a policy, and of the tokenizer that goes with it."""

    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    vocab_size: int = 16384
    tokenizer: VQConfig = field(default_factory=VQConfig)


_TINY_TOKENIZER = VQConfig(
    codebook_size=256, z_channels=32, channels=32,
    encoder_multipliers=(1,) * 5, decoder_multipliers=(1,) * 5, num_res_blocks=1,
)  # fmt: skip
SIZES = {
    "tiny": Sizes(64, 2, 2, 128, 256, _TINY_TOKENIZER),
    "B": Sizes(768, 12, 12, 2048),
    "L": Sizes(1024, 24, 16, 2816),
    "XL": Sizes(1280, 36, 20, 3584),
    "XXL": Sizes(1536, 48, 24, 4096),
    "3B": Sizes(3200, 24, 32, 8704),
}


def random_policy(
    name: str, image_size: int, *, device: torch.device, dtype: torch.dtype
) -> LlamaGen:
    """A class-conditional policy of one of `SIZES`."""
    sizes = SIZES[name]
    torch.manual_seed(0)
    config = LlamaGenConfig(
        dim=sizes.dim,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        ffn_dim=sizes.ffn_dim,
        vocab_size=sizes.vocab_size,
        image_size=image_size,
        num_classes=1000,
    )
    with device:  # 3B numbers take a GPU a moment and a CPU half a minute
        policy = LlamaGen(config)
    return policy.to(dtype=dtype)


def write_models(
    folder: Path, name: str, image_size: int, *, device: torch.device, dtype: torch.dtype
) -> None:
    """policy/ and tokenizer/ for a run to load."""
    policy = random_policy(name, image_size, device=device, dtype=dtype)
    save_policy(policy, folder / "policy")
    save_tokenizer(VQTokenizer(SIZES[name].tokenizer), folder / "tokenizer")


def brightness(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """A judge that costs nothing, so that a step's own work is seen."""
    return images.mean(dim=(1, 2, 3))
