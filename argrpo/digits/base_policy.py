"""The base policy of the digits task: LlamaGen's architecture, stopped long before it is good.

It learns the tokens of the policy split by cross-entropy, with a null class for guidance, and is
left under-trained on purpose: what GRPO makes of it has to be visible.

Letters: N images, T = 64 tokens, V codes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo.digits.dataset import IMAGE_SIZE, NUM_CLASSES, load_split, shift_and_rotate
from argrpo.digits.training import FitConfig, Progress, fit, no_progress, seeded_init
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.vq import VQTokenizer

_FIT = FitConfig(steps=300, batch_size=32, lr=2e-3, seed=4)
_MODEL = LlamaGenConfig(
    dim=128,
    num_layers=3,
    num_heads=2,
    ffn_dim=512,
    vocab_size=256,
    image_size=IMAGE_SIZE,
    downsample=4,
    num_classes=NUM_CLASSES,
)


@dataclass(frozen=True, kw_only=True)
class BasePolicyConfig:
    """Sizes of the policy and how it learns."""

    fit: FitConfig = _FIT
    """How long and how fast; the steps decide how much is left to GRPO."""

    model: LlamaGenConfig = _MODEL
    """0.85 M parameters."""

    label_dropout: float = 0.1
    """Share of the images shown under the null class, which guidance needs."""

    num_views: int = 8
    """Augmented copies of the split that are turned into tokens once, before the first step."""

    max_shift: float = 2.0
    """Augmentation: largest shift, in pixels."""

    max_degrees: float = 5.0
    """Augmentation: largest turn, in degrees."""


def train_base_policy(
    config: BasePolicyConfig, tokenizer: VQTokenizer, progress: Progress = no_progress
) -> LlamaGen:
    """A policy trained on the policy split, the same every time on one machine.

    Raises:
        ValueError: the tokenizer's codebook or grid is not the policy's.
    """
    _check_tokenizer(config.model, tokenizer)
    generator = torch.Generator().manual_seed(config.fit.seed)
    token_ids, labels = _token_views(config, tokenizer, generator)
    with seeded_init(config.fit.seed):
        policy = LlamaGen(config.model)

    def loss_of_step(step: int) -> Tensor:
        rows = torch.randint(len(labels), (config.fit.batch_size,), generator=generator)
        is_null = torch.rand(len(rows), generator=generator) < config.label_dropout
        conditions = labels[rows].masked_fill(is_null, config.model.num_classes)
        return next_token_loss(policy, conditions, token_ids[rows])

    fit("base policy", policy.parameters(), loss_of_step, config.fit, progress)
    return policy.requires_grad_(False)


def next_token_loss(policy: LlamaGen, labels: Tensor, token_ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token: a scalar with a graph.

    Args:
        policy: the model.
        labels: [N] int64 classes, the null class included.
        token_ids: [N, T] int64.
    """
    logits = F.linear(policy.hidden(labels, token_ids), policy.head_weight)
    return F.cross_entropy(logits.flatten(0, 1).float(), token_ids.flatten())


def _token_views(
    config: BasePolicyConfig, tokenizer: VQTokenizer, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Token ids [views * N, T] and labels [views * N] of the split, the first view as it is."""
    digits = load_split("policy")
    views = [tokenizer.encode(digits.images)]
    for _ in range(config.num_views - 1):
        moved = shift_and_rotate(
            digits.images, generator, max_shift=config.max_shift, max_degrees=config.max_degrees
        )
        views.append(tokenizer.encode(moved.clamp_(0.0, 1.0)))
    return torch.cat(views), digits.labels.repeat(config.num_views)


def _check_tokenizer(model: LlamaGenConfig, tokenizer: VQTokenizer) -> None:
    if tokenizer.config.codebook_size != model.vocab_size:
        raise ValueError(
            f"tokenizer: expected {model.vocab_size} codes, the policy's vocabulary, "
            f"got {tokenizer.config.codebook_size}"
        )
    if tokenizer.downsample != model.downsample:
        raise ValueError(
            f"tokenizer: expected {model.downsample} pixels a token as in the policy, "
            f"got {tokenizer.downsample}"
        )
