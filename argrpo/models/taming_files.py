"""Checkpoints of taming-transformers: a class-conditional transformer and its VQGAN in one file of
Lightning, sizes in the project YAML beside it. Read into our models, and written for its own code.

The VQGAN's networks are those of LlamaGen's tokenizer under other names. Other conditions than a
class, other orders of tokens and other places of attention than the coarsest level are refused.

Source: CompVis/taming-transformers at 3ba01b2, models/cond_transformer.py and vqgan.py.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from argrpo.models.checkpoint_files import Checkpoint, read_checkpoint
from argrpo.models.filling import fill
from argrpo.models.inert_globals import LIGHTNING
from argrpo.models.taming import Taming, TamingConfig
from argrpo.models.taming_project import TamingProject
from argrpo.models.vq import VQConfig, VQTokenizer

_POLICY, _TOKENIZER = "transformer.", "first_stage_model."

# What carries no weights of ours: causal masks, the discriminator and the perceptual loss.
_POLICY_EXTRAS = re.compile(r"blocks\.\d+\.attn\.mask")
_TOKENIZER_EXTRAS = re.compile(r"loss\..+")


def read_taming_checkpoint(path: str | Path) -> Checkpoint:
    """A Lightning file; objects of Lightning in it become stand-ins that do nothing.

    Raises:
        FileNotFoundError: nothing stands at the path.
        ValueError: it is damaged, holds no taming transformer, or would have to run code.
    """
    checkpoint = read_checkpoint(path, inert=LIGHTNING)
    if not any(key.startswith(_POLICY) for key in checkpoint.weights):
        raise ValueError(
            f"{path}: expected a checkpoint of a taming transformer with keys under {_POLICY}, got "
            "none"
        )
    return checkpoint


def taming_policy(
    checkpoint: Checkpoint, project: TamingProject, dtype: torch.dtype = torch.float32
) -> Taming:
    """The transformer of a checkpoint.

    Raises:
        ValueError: a key or shape is not what the project says, by name.
    """
    with torch.device("meta"):
        policy = Taming(project.policy_config())
    part = _part(checkpoint, _POLICY, _POLICY_EXTRAS)
    fill(policy, part, torch.device("cpu"), dtype, policy.published_names)
    return policy


def taming_tokenizer(
    checkpoint: Checkpoint, project: TamingProject, dtype: torch.dtype = torch.float32
) -> VQTokenizer:
    """The VQGAN of a checkpoint.

    Raises:
        ValueError: a key or shape is not what the project says, by name.
    """
    config = project.tokenizer_config()
    with torch.device("meta"):
        tokenizer = VQTokenizer(config)
    part = _part(checkpoint, _TOKENIZER, _TOKENIZER_EXTRAS)
    fill(tokenizer, part, torch.device("cpu"), dtype, lambda key: (vqgan_name(key, config),))
    return tokenizer


def taming_state_dict(policy: Taming, tokenizer: VQTokenizer) -> dict[str, Tensor]:
    """All that taming's `Net2NetTransformer` holds but the losses that train a VQGAN."""
    return {
        **{f"{_POLICY}{key}": weight for key, weight in _policy_weights(policy)},
        **{
            f"{_TOKENIZER}{vqgan_name(key, tokenizer.config)}": weight
            for key, weight in tokenizer.state_dict().items()
        },
    }


def vqgan_name(key: str, config: VQConfig) -> str:
    """The name in taming's VQGAN of a weight of ours."""
    network, _, rest = key.partition(".")
    level = re.fullmatch(r"conv_blocks\.(\d+)\.(res|attn|upsample|downsample)\.(.+)", rest)
    if level is not None:
        index = int(level[1])
        if network == "decoder":  # taming counts its levels from the finest
            index = len(config.decoder_multipliers) - 1 - index
        side = {"encoder": "down", "decoder": "up"}[network]
        part = "block" if level[2] == "res" else level[2]
        return f"{network}.{side}.{index}.{part}.{level[3]}"
    middle = re.fullmatch(r"mid\.(\d)\.(.+)", rest)
    if middle is not None:
        return f"{network}.mid.{('block_1', 'attn_1', 'block_2')[int(middle[1])]}.{middle[2]}"
    return key


def _policy_weights(policy: Taming) -> Iterator[tuple[str, Tensor]]:
    for key, weight in policy.state_dict().items():
        names = policy.published_names(key)
        yield from zip(names, weight.chunk(len(names)), strict=True)
    size = policy.config.num_positions
    mask = torch.ones(size, size).tril()[None, None]
    for layer in range(policy.config.num_layers):
        yield f"blocks.{layer}.attn.mask", mask


def _part(checkpoint: Checkpoint, prefix: str, extras: re.Pattern[str]) -> Checkpoint:
    """The weights under a prefix, without it and without what carries none of ours."""
    short = {
        key.removeprefix(prefix): weight
        for key, weight in checkpoint.weights.items()
        if key.startswith(prefix)
    }
    return checkpoint._replace(
        weights={key: weight for key, weight in short.items() if not extras.fullmatch(key)}
    )


def project_yaml(policy: TamingConfig, tokenizer: VQConfig) -> str:
    """The project file that taming's code builds the two models from."""
    multipliers = list(tokenizer.encoder_multipliers)
    return f"""model:
  target: taming.models.cond_transformer.Net2NetTransformer
  params:
    cond_stage_key: class_label
    transformer_config:
      target: taming.modules.transformer.mingpt.GPT
      params:
        vocab_size: {policy.vocab_size}
        block_size: {policy.num_positions}
        n_layer: {policy.num_layers}
        n_head: {policy.num_heads}
        n_embd: {policy.dim}
    first_stage_config:
      target: taming.models.vqgan.VQModel
      params:
        embed_dim: {tokenizer.codebook_dim}
        n_embed: {tokenizer.codebook_size}
        ddconfig:
          double_z: false
          z_channels: {tokenizer.z_channels}
          resolution: {policy.image_size}
          in_channels: 3
          out_ch: 3
          ch: {tokenizer.channels}
          ch_mult: {multipliers}
          num_res_blocks: {tokenizer.num_res_blocks}
          attn_resolutions: [{policy.grid_size}]
          dropout: 0.0
        lossconfig:
          target: taming.modules.losses.DummyLoss
    cond_stage_config:
      target: taming.modules.util.Labelator
      params:
        n_classes: {policy.num_classes}
"""
