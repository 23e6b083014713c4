"""The sizes of a VQ tokenizer, read off the shapes of its weights."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from argrpo.models.vq import VQConfig


def infer_config(state_dict: Mapping[str, Tensor]) -> VQConfig:
    """Read a tokenizer's sizes off the shapes of its weights.

    Args:
        state_dict: weights under the published names, no prefix.

    Raises:
        ValueError: a weight that fixes a size is missing, named by its key, or does not fit.
    """

    def shape(key: str) -> torch.Size:
        if key not in state_dict:
            raise ValueError(f"{key}: expected in a tokenizer's weights, not found")
        return state_dict[key].shape

    def widths(network: str) -> tuple[int, ...]:
        levels = _count_modules(state_dict, f"{network}.conv_blocks")
        key = network + ".conv_blocks.{}.res.0.conv1.weight"
        return tuple(shape(key.format(level))[0] for level in range(max(levels, 1)))

    codebook_size, codebook_dim = shape("quantize.embedding.weight")
    channels = shape("encoder.conv_in.weight")[0]
    encoder_widths = widths("encoder")
    decoder_widths = widths("decoder")
    for network, found in (("encoder", encoder_widths), ("decoder", decoder_widths)):
        if any(width % channels for width in found):
            raise ValueError(
                f"{network}.conv_blocks: expected widths that are multiples of {channels}, "
                f"the channels of encoder.conv_in, got {found}"
            )
    return VQConfig(
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        z_channels=shape("quant_conv.weight")[1],
        channels=channels,
        encoder_multipliers=tuple(width // channels for width in encoder_widths),
        # The decoder's modules run from coarse to fine; the config lists both finest first.
        decoder_multipliers=tuple(width // channels for width in reversed(decoder_widths)),
        num_res_blocks=_count_modules(state_dict, "encoder.conv_blocks.0.res"),
    )


def _count_modules(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """Number of distinct children i of keys `prefix.i.*`."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, state_dict) if match})
