"""The convolutional encoder and decoder of LlamaGen's VQ tokenizer, under the published names.

Residual blocks at every level, attention at the coarsest one and in the middle. N images, H x W
pixels, h x w tokens.

Source: FoundationVision/LlamaGen at ce98ec4, tokenizer/tokenizer_image/vq_model.py.
"""

import torch.nn.functional as F
from torch import Tensor, nn

NORM_GROUPS = 32
_NORM_EPS = 1e-6


class Encoder(nn.Module):
    """Pixels [N, 3, H, W] to features [N, z_channels, h, w].

    Args:
        widths: channels of each level, finest first; all but the last halve the resolution.
        channels: channels of the first convolution.
        z_channels: channels of the features.
        num_res_blocks: residual blocks of a level.
    """

    def __init__(
        self, widths: tuple[int, ...], *, channels: int, z_channels: int, num_res_blocks: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        width_in = channels
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            self.conv_blocks.append(
                _Level(width_in, width, num_res_blocks, attends=last)
                if last
                else _DownLevel(width_in, width, num_res_blocks)
            )
            width_in = width
        self.mid = _middle(width_in)
        self.norm_out = _norm(width_in)
        self.conv_out = nn.Conv2d(width_in, z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Features [N, z_channels, h, w] to pixels [N, 3, H, W].

    Args:
        widths: channels of each level, coarsest first; all but the last double the resolution.
        z_channels: channels of the features.
        num_res_blocks: residual blocks of a level.
    """

    def __init__(self, widths: tuple[int, ...], *, z_channels: int, num_res_blocks: int) -> None:
        super().__init__()
        width_in = widths[0]
        self.conv_in = nn.Conv2d(z_channels, width_in, 3, padding=1)
        self.mid = _middle(width_in)
        self.conv_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            # Attention belongs to the coarsest level, which the decoder meets first.
            attends = level == 0
            self.conv_blocks.append(
                _Level(width_in, width, num_res_blocks, attends=attends)
                if level == len(widths) - 1
                else _UpLevel(width_in, width, num_res_blocks, attends=attends)
            )
            width_in = width
        self.norm_out = _norm(width_in)
        self.conv_out = nn.Conv2d(width_in, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class _Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where `attends`."""

    def __init__(self, width_in: int, width: int, num_res_blocks: int, *, attends: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            _ResBlock(width_in if i == 0 else width, width) for i in range(num_res_blocks)
        )
        self.attn = nn.ModuleList(_Attention(width) for _ in range(num_res_blocks * attends))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class _DownLevel(_Level):
    def __init__(self, width_in: int, width: int, num_res_blocks: int) -> None:
        super().__init__(width_in, width, num_res_blocks, attends=False)
        self.downsample = _Resample(width, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # The published downsampling pads the right and the bottom only.
        return self.downsample(F.pad(super().forward(x), (0, 1, 0, 1)))


class _UpLevel(_Level):
    def __init__(self, width_in: int, width: int, num_res_blocks: int, *, attends: bool) -> None:
        super().__init__(width_in, width, num_res_blocks, attends=attends)
        self.upsample = _Resample(width, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(F.interpolate(super().forward(x), scale_factor=2.0, mode="nearest"))


class _Resample(nn.Module):
    """The convolution of a change of resolution, under the published name `conv`."""

    def __init__(self, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=0 if stride == 2 else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _ResBlock(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = None if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class _Attention(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (conv(normed).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([_ResBlock(width, width), _Attention(width), _ResBlock(width, width)])


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, width, eps=_NORM_EPS)
