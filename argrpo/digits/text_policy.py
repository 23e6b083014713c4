"""The base policy of the digits task with captions: it reads texts, and is stopped early as well.

It learns the tokens of the policy split under captions that are true of the pictures, with the
learned null text for guidance.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo.digits.captions import captioned
from argrpo.digits.dataset import IMAGE_SIZE, load_split
from argrpo.digits.training import FitConfig, Progress, fit, no_progress, seeded_init
from argrpo.encoded_texts import EncodedTexts
from argrpo.engine.conditions import TextFeatures
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.vq import VQTokenizer

PREFIX_LEN = 10
"""Positions of a caption; the longest is nine words and marks with its end."""

WIDTH = 64
"""Features of a position."""

_FIT = FitConfig(steps=450, batch_size=32, lr=2e-3, seed=6)
_MODEL = LlamaGenConfig(
    dim=128,
    num_layers=3,
    num_heads=2,
    ffn_dim=512,
    vocab_size=256,
    image_size=IMAGE_SIZE,
    downsample=4,
    model_type="t2i",
    caption_dim=WIDTH,
    prefix_len=PREFIX_LEN,
)


@dataclass(frozen=True, kw_only=True)
class TextPolicyConfig:
    """Sizes of the policy and how it learns."""

    fit: FitConfig = _FIT
    """How long and how fast; the steps decide how much is left to GRPO."""

    model: LlamaGenConfig = _MODEL
    """0.87 M parameters."""

    text_dropout: float = 0.1
    """Share of the images shown under the null text, which guidance needs."""

    num_views: int = 8
    """Moved copies of the split that are turned into tokens once, before the first step."""


def train_text_policy(
    config: TextPolicyConfig,
    tokenizer: VQTokenizer,
    captions: EncodedTexts,
    progress: Progress = no_progress,
) -> LlamaGen:
    """A policy trained on the policy split, the same every time on one machine.

    Args:
        config: its sizes and how it learns.
        tokenizer: of the digits.
        captions: the features of all `argrpo.digits.captions.CAPTIONS`.
        progress: told what is done.
    """
    generator = torch.Generator().manual_seed(config.fit.seed)
    token_ids, rows = _token_views(config, tokenizer, generator)
    features = captions.conditions(torch.arange(len(captions.index)))
    with seeded_init(config.fit.seed):
        policy = LlamaGen(config.model)

    def loss_of_step(step: int) -> Tensor:
        chosen = torch.randint(len(rows), (config.fit.batch_size,), generator=generator)
        is_null = torch.rand(len(chosen), generator=generator) < config.text_dropout
        conditions = _with_nulls(policy, features, rows[chosen], is_null)
        hidden = policy.hidden(conditions, token_ids[chosen])
        logits = F.linear(hidden, policy.head_weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), token_ids[chosen].flatten())

    fit("text policy", policy.parameters(), loss_of_step, config.fit, progress)
    return policy.requires_grad_(False)


def _token_views(
    config: TextPolicyConfig, tokenizer: VQTokenizer, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Token ids [views * N, T] and captions [views * N] of the split."""
    digits = load_split("policy")
    views = [captioned(digits, generator) for _ in range(config.num_views)]
    token_ids = torch.cat([tokenizer.encode(view.images) for view in views])
    return token_ids, torch.cat([view.captions for view in views])


def _with_nulls(
    policy: LlamaGen, features: TextFeatures, rows: Tensor, is_null: Tensor
) -> TextFeatures:
    """Conditions of images with captions `rows`, or with the null text of the same length."""
    texts = TextFeatures(features.features, features.mask, features.rows[rows])
    null = policy.null_conditions(texts)
    assert isinstance(null, TextFeatures)
    both = torch.cat([texts.features.to(null.features.dtype), null.features])
    index = torch.where(is_null, len(texts.features) + null.rows, texts.rows)
    return TextFeatures(both, torch.cat([texts.mask, null.mask]), index)
