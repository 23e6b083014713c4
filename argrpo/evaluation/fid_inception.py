"""The Inception network of published FID, IS, precision and recall: TensorFlow's of 2015.

Torchvision's definition with the pools of the TensorFlow graph, under the parameter names of
`pt_inception-2015-12-05-6726825d.pth` (mseitzer/pytorch-fid) and of torch-fidelity's
`weights-inception-2015-12-05-6726825d.pth`, which hold the same weights. Three outputs:

    pooled     [N, 2048]   after the average pool: FID, precision and recall
    logits     [N, 1008]   without their bias: the inception score
    spatial    [N, 2023]   the first 7 channels of the 17 x 17 map of the 1x1 branch of the fourth
                           block of that size (`mixed_6/conv` there, Mixed_6d here): sFID

Images are resized as TensorFlow 1 did, bilinear without antialiasing, the grid not centred.

Shapes: N images.

Source: Heusel et al., arXiv:1706.08500; Nash et al., arXiv:2103.03841 (sFID);
openai/guided-diffusion at 22e0df8, evaluations/evaluator.py; toshas/torch-fidelity at 5e211a9.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception

_SIZE = 299
_SPATIAL_CHANNELS = 7
_NUM_LOGITS = 1008
SPATIAL_DIM = _SPATIAL_CHANNELS * 17 * 17


class InceptionOutputs(NamedTuple):
    """What the network says of images."""

    pooled: Tensor  # [N, 2048] fp32
    logits: Tensor  # [N, 1008] fp32, without the bias
    spatial: Tensor  # [N, 2023] fp32, position by position


class FidInception(nn.Module):
    """The network; its weights are random until a state_dict is loaded."""

    def __init__(self) -> None:
        super().__init__()
        conv = inception.BasicConv2d
        self.Conv2d_1a_3x3 = conv(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = conv(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = conv(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = conv(80, 192, kernel_size=3)
        self.Mixed_5b = _BlockA(192, pool_features=32)
        self.Mixed_5c = _BlockA(256, pool_features=64)
        self.Mixed_5d = _BlockA(288, pool_features=64)
        self.Mixed_6a = inception.InceptionB(288)
        self.Mixed_6b = _BlockC(768, channels_7x7=128)
        self.Mixed_6c = _BlockC(768, channels_7x7=160)
        self.Mixed_6d = _BlockC(768, channels_7x7=160)
        self.Mixed_6e = _BlockC(768, channels_7x7=192)
        self.Mixed_7a = inception.InceptionD(768)
        self.Mixed_7b = _BlockE(1280)
        self.Mixed_7c = _LastBlock(2048)
        self.fc = nn.Linear(2048, _NUM_LOGITS)

    def forward(self, images: Tensor) -> InceptionOutputs:
        """Outputs of images [N, 3, H, W] floating point in [0, 1]."""
        x = (resize_like_tensorflow(255.0 * images, _SIZE) - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6c(self.Mixed_6b(x))
        # Channels last before they are laid out in a row, because mu_s of a file is.
        spatial = self.Mixed_6d.branch1x1(x)[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        pooled = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))
        return InceptionOutputs(pooled, F.linear(pooled, self.fc.weight), spatial)


def resize_like_tensorflow(images: Tensor, size: int) -> Tensor:
    """Bilinear, output i at input i * scale, without antialiasing: TensorFlow 1's default.

    Args:
        images: [N, C, H, W] floating point.
        size: H and W of the result.
    """
    for dim in (2, 3):
        length = images.shape[dim]
        # In fp32, as there: the place of an output decides between which pixels it lies.
        place = torch.arange(size, device=images.device).float() * torch.tensor(length / size)
        low = place.long()
        high = (low + 1).clamp_max(length - 1)
        share = (place - low).view([-1, 1] if dim == 2 else [-1]).to(images.dtype)
        below, above = images.index_select(dim, low), images.index_select(dim, high)
        images = below + (above - below) * share
    return images


class _BlockA(inception.InceptionA):
    """Padding does not count in the average."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average(x)),
        ]


class _BlockC(inception.InceptionC):
    """Padding does not count in the average."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(twice)),
            self.branch_pool(_average(x)),
        ]


class _BlockE(inception.InceptionE):
    """Padding does not count in the average."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return self._branches(x, _average(x))

    def _branches(self, x: Tensor, pooled: Tensor) -> list[Tensor]:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [
            self.branch1x1(x),
            self.branch3x3_2a(once),
            self.branch3x3_2b(once),
            self.branch3x3dbl_3a(twice),
            self.branch3x3dbl_3b(twice),
            self.branch_pool(pooled),
        ]


class _LastBlock(_BlockE):
    """A maximum in place of the average, as the graph has it."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return self._branches(x, F.max_pool2d(x, kernel_size=3, stride=1, padding=1))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)
