"""The VQ image tokenizer of LlamaGen and of VQGAN, whose networks it shares: images to token ids
and back.

A convolutional encoder, a codebook, a convolutional decoder; LlamaGen's codes have unit length.
Parameters carry the names of LlamaGen's checkpoints, so their state dicts load strictly once the
one bookkeeping buffer in `KNOWN_EXTRAS` is dropped. Pixels are in [0, 1] on both sides; the
networks work in [-1, 1].

Letters: N images, T tokens of an image (row-major), D codebook dimension, h x w the token grid,
H x W the picture, K codes.

Source: FoundationVision/LlamaGen at ce98ec4, tokenizer/tokenizer_image/vq_model.py (the
architecture and the parameter names); Sun et al., arXiv:2406.06525.
"""

from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argrpo.models.vq_networks import NORM_GROUPS, Decoder, Encoder

KNOWN_EXTRAS = ("quantize.codebook_used",)
"""Keys of published tokenizer checkpoints that carry no weights: a usage counter of training."""

# Channels at multiplier 1 from which a CPU is faster with the channels of a pixel side by side
# (bench/bench_decode.py). Below, a group of the norm is so narrow that it loses what convolutions
# gain; the published tokenizers have 128.
_CHANNELS_LAST_FROM = 128


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Sizes of a tokenizer; the defaults are the published VQ-16.

    Example:
        The published VQ-8 has multipliers (1, 2, 2, 4) on both sides.
    """

    codebook_size: int = 16384
    """Number of codes; token ids are below it."""

    codebook_dim: int = 8
    """Length of a code."""

    z_channels: int = 256
    """Channels between the networks and the two 1x1 convolutions around the codebook."""

    channels: int = 128
    """Channels at multiplier 1; every level must come to a multiple of 32 (the norm's groups)."""

    encoder_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channel multiplier of each encoder level, finest first; a level halves the resolution."""

    decoder_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channel multiplier of each decoder level, finest first."""

    num_res_blocks: int = 2
    """Residual blocks of an encoder level; a decoder level has one more."""

    unit_codes: bool = True
    """Whether codes and latents are scaled to length 1, as LlamaGen's; VQGAN's stay as they are."""

    def __post_init__(self) -> None:
        for name in ("codebook_size", "codebook_dim", "z_channels", "channels", "num_res_blocks"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"tokenizer.{name}: expected at least 1, got {value}")
        if len(self.encoder_multipliers) != len(self.decoder_multipliers):
            raise ValueError(
                f"tokenizer.decoder_multipliers: expected as many levels as the encoder's "
                f"{len(self.encoder_multipliers)}, got {len(self.decoder_multipliers)}"
            )
        for name in ("encoder_multipliers", "decoder_multipliers"):
            for multiplier in getattr(self, name) or (0,):
                width = self.channels * multiplier
                if width < 1 or width % NORM_GROUPS:
                    raise ValueError(
                        f"tokenizer.{name}: expected levels of a multiple of {NORM_GROUPS} "
                        f"channels, got {self.channels} * {multiplier}"
                    )

    @property
    def downsample(self) -> int:
        """Pixels of a token's side."""
        return 2 ** (len(self.encoder_multipliers) - 1)


class VQTokenizer(nn.Module):
    """Images to token ids and back."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(
            tuple(config.channels * multiplier for multiplier in config.encoder_multipliers),
            channels=config.channels,
            z_channels=config.z_channels,
            num_res_blocks=config.num_res_blocks,
        )
        self.decoder = Decoder(
            tuple(config.channels * m for m in reversed(config.decoder_multipliers)),
            z_channels=config.z_channels,
            num_res_blocks=config.num_res_blocks + 1,
        )
        self.quantize = _Codebook(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    @property
    def downsample(self) -> int:
        """Pixels of a token's side."""
        return self.config.downsample

    @property
    def device(self) -> torch.device:
        return self.quantize.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.quantize.embedding.weight.dtype

    @property
    def memory_format(self) -> torch.memory_format:
        """Of what enters the networks, which keep it; the weights stay as files hold them."""
        # On a GPU nothing is measured yet; there the layout is the plain one.
        if self.device.type == "cpu" and self.config.channels >= _CHANNELS_LAST_FROM:
            return torch.channels_last
        return torch.contiguous_format

    @torch.no_grad()
    def encode(self, images: Tensor, *, encode_batch: int = 16) -> Tensor:
        """Token ids of images.

        Args:
            images: [N, 3, H, W] floating point in [0, 1], any device; H and W multiples of
                `downsample`.
            encode_batch: images in the encoder at a time; bounds the memory.

        Returns:
            [N, T] int64, row-major, on the tokenizer's device.

        Raises:
            ValueError: the shape, dtype or range is not as above, by name.
        """
        self._check_images(images)
        _check_batch("encode_batch", encode_batch)
        num_images, _, height, width = images.shape
        num_tokens = (height // self.downsample) * (width // self.downsample)
        token_ids = torch.empty((num_images, num_tokens), dtype=torch.int64, device=self.device)
        for start in range(0, num_images, encode_batch):
            rows = slice(start, start + encode_batch)
            pixels = images[rows].to(self.device, self.dtype) * 2.0 - 1.0
            token_ids[rows] = self.nearest_codes(self.encode_latents(pixels)).flatten(1)
        return token_ids

    @torch.no_grad()
    def decode(
        self,
        token_ids: Tensor,
        *,
        grid: tuple[int, int] | None = None,
        decode_batch: int = 16,
    ) -> Tensor:
        """Images of token ids.

        Args:
            token_ids: [N, T] int64 below `codebook_size`, row-major, any device.
            grid: rows and columns of the token grid, h * w = T; None for a square.
            decode_batch: images in the decoder at a time; bounds the memory.

        Returns:
            [N, 3, H, W] fp32 in [0, 1], on the tokenizer's device.

        Raises:
            ValueError: a shape, dtype or token id is not as above, by name.
        """
        rows_of_grid, columns = self._check_token_ids(token_ids, grid)
        _check_batch("decode_batch", decode_batch)
        num_images = token_ids.shape[0]
        size = (num_images, 3, rows_of_grid * self.downsample, columns * self.downsample)
        images = torch.empty(size, dtype=torch.float32, device=self.device)
        for start in range(0, num_images, decode_batch):
            rows = slice(start, start + decode_batch)
            codes = token_ids[rows].to(self.device).reshape(-1, rows_of_grid, columns)
            pixels = self.decode_latents(self.codes(codes))
            images[rows] = pixels.float().mul_(0.5).add_(0.5).clamp_(0.0, 1.0)
        return images

    def encode_latents(self, pixels: Tensor) -> Tensor:
        """Latents [N, D, h, w], before they are normalised, of pixels [N, 3, H, W] in [-1, 1]."""
        return self.quant_conv(self.encoder(pixels.contiguous(memory_format=self.memory_format)))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], not clamped, nominally in [-1, 1], of codes [N, D, h, w]."""
        latents = latents.contiguous(memory_format=self.memory_format)
        return self.decoder(self.post_quant_conv(latents))

    def codebook(self) -> Tensor:
        """[K, D], rows of length 1 with `unit_codes`; the file's rows are not."""
        weight = self.quantize.embedding.weight
        return F.normalize(weight, dim=-1) if self.config.unit_codes else weight

    def codes(self, token_ids: Tensor) -> Tensor:
        """Codes [N, D, h, w] of token ids [N, h, w]."""
        return F.embedding(token_ids, self.codebook()).permute(0, 3, 1, 2).contiguous()

    def nearest_codes(self, latents: Tensor) -> Tensor:
        """Token ids [N, h, w] int64 of the codes nearest to latents [N, D, h, w]: in angle with
        `unit_codes`, else in distance."""
        codebook, rows = self.codebook(), latents.permute(0, 2, 3, 1)
        if self.config.unit_codes:
            # Between unit vectors the squared distance is 2 - 2 cos: nearest is the largest cosine.
            return (F.normalize(rows, dim=-1) @ codebook.T).argmax(dim=-1)
        # What |z - c|^2 is but for |z|^2, which all codes share.
        distances = codebook.square().sum(dim=-1) - 2 * (rows @ codebook.T)
        return distances.argmin(dim=-1)

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images: expected [N, 3, H, W] floating point, got {list(images.shape)} "
                f"{images.dtype}"
            )
        height, width = images.shape[2:]
        if height % self.downsample or width % self.downsample or not height * width:
            raise ValueError(
                f"images: expected a height and width that are multiples of {self.downsample}, "
                f"got {height} x {width}"
            )
        # One read back from the device; pixels in [-1, 1] would else be encoded into nonsense.
        low, high = torch.stack(images.aminmax()).tolist() if len(images) else (0.0, 0.0)
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(f"images: expected pixels in [0, 1], got {low:.4g} to {high:.4g}")

    def _check_token_ids(self, token_ids: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
        if token_ids.ndim != 2 or token_ids.dtype != torch.int64:
            raise ValueError(
                f"token_ids: expected [N, T] int64, got {list(token_ids.shape)} {token_ids.dtype}"
            )
        num_tokens = token_ids.shape[1]
        if grid is None:
            side = isqrt(num_tokens)
            if num_tokens == 0 or side * side != num_tokens:
                raise ValueError(
                    f"token_ids: expected a square number of tokens an image, got {num_tokens}; "
                    f"pass grid=(rows, columns)"
                )
            grid = (side, side)
        elif grid[0] < 1 or grid[1] < 1 or grid[0] * grid[1] != num_tokens:
            raise ValueError(
                f"grid: expected rows * columns = {num_tokens} tokens, got {grid[0]} x {grid[1]}"
            )
        # One read back from the device; an index past the codebook would kill the CUDA context.
        low, high = torch.stack(token_ids.aminmax()).tolist() if len(token_ids) else (0, 0)
        if low < 0 or high >= self.config.codebook_size:
            raise ValueError(
                f"token_ids: expected ids in [0, {self.config.codebook_size}), got {low} to {high}"
            )
        return grid


def _check_batch(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: expected at least 1 image, got {value}")


class _Codebook(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
