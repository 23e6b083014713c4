"""What LlamaGen's and AR-GRPO's own code reads: a state dict under the published names, sizes as
their config.json says them, and the names that their code builds models by.

Source: FoundationVision/LlamaGen at ce98ec4, gpt.py, gpt_hf.py, vq_model.py and vq_model_hf.py;
Kwai-Klear/AR-GRPO at 65947ad, autoregressive/modeling.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import published_weights
from argrpo.models.policy_config import ARGRPO_MODEL_TYPE
from argrpo.models.vq import VQConfig, VQTokenizer

# (width, layers, heads) of the sizes that LlamaGen's code has names for.
_SIZES = {
    (768, 12, 12): "GPT-B",
    (1024, 24, 16): "GPT-L",
    (1280, 36, 20): "GPT-XL",
    (1536, 48, 24): "GPT-XXL",
    (2560, 48, 40): "GPT-XXXL",
    (2048, 22, 32): "GPT-1B",
    (3200, 24, 32): "GPT-3B",
    (4096, 32, 32): "GPT-7B",
}
_TOKENIZERS = {(1, 1, 2, 2, 4): "VQ-16", (1, 2, 2, 4): "VQ-8"}  # by multipliers, both sides

# What its code takes for granted, in no config.
_CHANNELS, _RES_BLOCKS = 128, 2
_ARGRPO_CODES, _ARGRPO_CLASSES = 16384, 1000
# A usage counter of training that its loader asks for.
_COUNTER, _COUNTER_SIZE = "quantize.codebook_used", 65536
_FFN_MULTIPLE = 256


class ArgrpoFolder(NamedTuple):
    """The two files of a folder that AR-GRPO's `ImgGen_HF.from_pretrained` reads."""

    weights: dict[str, Tensor]
    config: dict[str, object]


def size_name(config: LlamaGenConfig) -> str | None:
    """What LlamaGen calls a policy of this size; None if it has no name for it."""
    return _SIZES.get((config.dim, config.num_layers, config.num_heads))


def policy_state_dict(policy: LlamaGen) -> dict[str, Tensor]:
    """What the `load_state_dict` of LlamaGen's `Transformer` takes, strictly."""
    return published_weights(policy)


def tokenizer_state_dict(tokenizer: VQTokenizer) -> dict[str, Tensor]:
    """What the `load_state_dict` of LlamaGen's `VQModel` takes, strictly.

    Raises:
        ValueError: its code cannot build such a tokenizer.
    """
    config = tokenizer.config
    _check_tokenizer(config)
    weights = dict(tokenizer.state_dict())
    dtype = weights["quant_conv.weight"].dtype
    return {**weights, _COUNTER: torch.zeros(_COUNTER_SIZE, dtype=dtype)}


def hub_policy_config(config: LlamaGenConfig) -> dict[str, object]:
    """The flat config.json of LlamaGen's `TransformerHF`."""
    return {
        "dim": config.dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        **_ffn_sizes(config),
        "rope_base": config.rope_base,
        "norm_eps": config.norm_eps,
        "num_classes": config.num_classes,
        "caption_dim": config.caption_dim,
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "cls_token_num": config.prefix_len,
        "block_size": config.num_image_tokens,
    }


def hub_tokenizer_config(config: VQConfig) -> dict[str, object]:
    """The flat config.json of LlamaGen's `VQModelHF`.

    Raises:
        ValueError: its code cannot build such a tokenizer.
    """
    _check_tokenizer(config)
    return {
        "codebook_size": config.codebook_size,
        "codebook_embed_dim": config.codebook_dim,
        "codebook_l2_norm": True,
        "encoder_ch_mult": list(config.encoder_multipliers),
        "decoder_ch_mult": list(config.decoder_multipliers),
        "z_channels": config.z_channels,
    }


def argrpo_folder(policy: LlamaGen, tokenizer: VQTokenizer) -> ArgrpoFolder:
    """A policy and its tokenizer as AR-GRPO keeps them.

    Raises:
        ValueError: AR-GRPO's code builds no policy or tokenizer of these sizes; it knows LlamaGen's
            names alone.
    """
    sizes, codes = policy.config, tokenizer.config
    name, tokenizer_name = size_name(sizes), _TOKENIZERS.get(codes.encoder_multipliers)
    is_named = codes.encoder_multipliers == codes.decoder_multipliers and tokenizer_name is not None
    fixed = (sizes.vocab_size, sizes.num_classes)
    if name is None or fixed != (_ARGRPO_CODES, _ARGRPO_CLASSES) or _ffn_sizes(sizes):
        raise ValueError(
            f"policy: expected a size that LlamaGen has a name for ({', '.join(_SIZES.values())}), "
            f"with {_ARGRPO_CODES} codes and {_ARGRPO_CLASSES} classes, got width {sizes.dim}, "
            f"{sizes.num_layers} layers, {sizes.num_heads} heads, {fixed[0]} codes, {fixed[1]} "
            "classes"
        )
    if not is_named:
        raise ValueError(
            f"tokenizer: expected {' or '.join(_TOKENIZERS.values())}, got multipliers "
            f"{codes.encoder_multipliers} and {codes.decoder_multipliers}"
        )
    parts = {"gpt_model.": policy_state_dict(policy), "vq_model.": tokenizer_state_dict(tokenizer)}
    weights = {
        f"{prefix}{key}": weight for prefix, part in parts.items() for key, weight in part.items()
    }
    config: dict[str, object] = {
        "architectures": [ARGRPO_MODEL_TYPE],
        "model_type": ARGRPO_MODEL_TYPE,
        "gpt_model": name,
        "gpt_type": sizes.model_type,
        "vq_model": tokenizer_name,
        "codebook_size": codes.codebook_size,
        "codebook_embed_dim": codes.codebook_dim,
        "image_size": sizes.image_size,
        "downsample_size": sizes.downsample,
        "cls_token_num": sizes.prefix_len,
    }
    return ArgrpoFolder(weights, config)


def _ffn_sizes(config: LlamaGenConfig) -> dict[str, object]:
    """The settings beside the width that give LlamaGen's code this feed-forward width."""
    usual = int(2 * 4 * config.dim / 3)
    if -(-usual // _FFN_MULTIPLE) * _FFN_MULTIPLE == config.ffn_dim:
        return {}
    # It cuts the product off behind the point.
    return {"multiple_of": 1, "ffn_dim_multiplier": (config.ffn_dim + 0.5) / usual}


def _check_tokenizer(config: VQConfig) -> None:
    if not config.unit_codes:
        raise ValueError(
            "tokenizer: expected codes of unit length, as LlamaGen's tokenizer has, got a VQGAN; "
            "argrpo convert taming_transformers writes it for its own code"
        )
    if (config.channels, config.num_res_blocks) != (_CHANNELS, _RES_BLOCKS):
        raise ValueError(
            f"tokenizer: expected {_CHANNELS} channels and {_RES_BLOCKS} residual blocks a level, "
            f"which LlamaGen's code takes for granted, got {config.channels} and "
            f"{config.num_res_blocks}"
        )
