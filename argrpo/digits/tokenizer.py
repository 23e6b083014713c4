"""A small VQ tokenizer of LlamaGen's architecture, trained on digits: 32 x 32 pixels, 8 x 8 tokens.

The loss is the mean squared error of the pixels in [-1, 1], plus the codebook's pull towards the
latents and, at a quarter of it, the latents' towards the codebook; gradients pass the codebook
straight through. Codes are unit vectors, as in the published tokenizers. A code that no latent of
a while has chosen is moved onto a latent, so the codebook stays in use.

Source: van den Oord et al., arXiv:1711.00937, equation 3; FoundationVision/LlamaGen at ce98ec4,
tokenizer/tokenizer_image/vq_model.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from argrpo.digits.dataset import load_split, shift_and_rotate
from argrpo.digits.training import FitConfig, Progress, fit, no_progress, seeded_init
from argrpo.models.vq import VQConfig, VQTokenizer

_FIT = FitConfig(steps=400, batch_size=16, lr=3e-3, weight_decay=0.0, seed=3)
_MODEL = VQConfig(
    codebook_size=256,
    codebook_dim=8,
    z_channels=32,
    channels=32,
    encoder_multipliers=(1, 1, 1),
    decoder_multipliers=(1, 1, 1),
    num_res_blocks=1,
)


@dataclass(frozen=True, kw_only=True)
class DigitTokenizerConfig:
    """Sizes of the tokenizer and how it learns."""

    fit: FitConfig = _FIT
    """How long and how fast."""

    model: VQConfig = _MODEL
    """Three levels: a token covers 4 x 4 pixels."""

    commitment: float = 0.25
    """Weight of the latents' pull towards their codes; the codes' towards the latents has 1."""

    revive_every: int = 20
    """Steps between two searches for codes out of use."""

    revive_share: float = 0.7
    """Share of the steps after which codes are left where they are, to settle."""

    max_shift: float = 2.5
    """Augmentation: largest shift, in pixels."""

    max_degrees: float = 8.0
    """Augmentation: largest turn, in degrees."""


def train_tokenizer(config: DigitTokenizerConfig, progress: Progress = no_progress) -> VQTokenizer:
    """A tokenizer trained on the policy split, the same every time on one machine."""
    digits = load_split("policy")
    generator = torch.Generator().manual_seed(config.fit.seed)
    with seeded_init(config.fit.seed):
        tokenizer = VQTokenizer(config.model)
    use = torch.zeros(config.model.codebook_size)

    def loss_of_step(step: int) -> Tensor:
        rows = torch.randint(len(digits), (config.fit.batch_size,), generator=generator)
        images = shift_and_rotate(
            digits.images[rows],
            generator,
            max_shift=config.max_shift,
            max_degrees=config.max_degrees,
        )
        pixels = images * 2.0 - 1.0
        latents = tokenizer.encode_latents(pixels)
        if step % config.revive_every == 0 and step <= config.revive_share * config.fit.steps:
            revive_unused_codes(tokenizer, use, latents.detach(), generator)
            use.zero_()
        codes, loss, token_ids = quantize_straight_through(tokenizer, latents, config.commitment)
        use.add_(torch.bincount(token_ids.flatten(), minlength=len(use)))
        return loss + F.mse_loss(tokenizer.decode_latents(codes), pixels)

    fit("tokenizer", tokenizer.parameters(), loss_of_step, config.fit, progress)
    return tokenizer.requires_grad_(False)


def quantize_straight_through(
    tokenizer: VQTokenizer, latents: Tensor, commitment: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest codes, with gradients as if nothing had been rounded.

    Args:
        tokenizer: whose codebook; its gradient comes from the loss.
        latents: [N, D, h, w], not normalised.
        commitment: weight of the latents' pull towards their codes.

    Returns:
        Codes [N, D, h, w] whose gradient reaches `latents`; the codebook and commitment loss, a
        scalar; the token ids [N, h, w].
    """
    directions = F.normalize(latents, dim=1)
    token_ids = tokenizer.nearest_codes(latents.detach())
    codes = tokenizer.codes(token_ids)
    loss = F.mse_loss(codes, directions.detach())
    loss = loss + commitment * F.mse_loss(directions, codes.detach())
    return directions + (codes - directions).detach(), loss, token_ids


@torch.no_grad()
def revive_unused_codes(
    tokenizer: VQTokenizer, use: Tensor, latents: Tensor, generator: torch.Generator
) -> None:
    """Move codes that were never chosen onto latents, drawn without replacement.

    Args:
        tokenizer: whose codebook changes, in place.
        use: [K] how often each code was chosen.
        latents: [N, D, h, w], not normalised; with fewer than unused codes, some codes stay.
        generator: a CPU generator; moved on.
    """
    unused = (use == 0).nonzero().squeeze(1)
    directions = F.normalize(latents, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    rows = torch.randperm(len(directions), generator=generator)[: len(unused)]
    tokenizer.quantize.embedding.weight[unused[: len(rows)]] = directions[rows]
