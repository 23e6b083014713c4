"""Quality of an image without a reference: MANIQA on crops of 224 pixels, all crops in batches.

There are two published numbers, of other crops and other averages; say which one you mean.

    grid     pyiqa's: crops on a regular grid, ceil(sqrt(n)) a side and the first n of them, and one
             average over all patches of all crops, weighted by the network
    random   AR-GRPO's: crops anywhere, a weighted average in each and the mean of those. Theirs are
             drawn anew each time; here an image decides its crops by its pixels and a seed, so that
             it has one score, whatever batch it is in and whenever a run is resumed

The network is pyiqa's, without the last two of its twelve blocks, which nothing reads. A crop costs
0.28 TFLOP, so that 20 of them are most of what judging an image costs; fewer, and bfloat16, are
options. At 256 pixels any two overlap by 192 pixels or more.

Shapes: N images, K crops of each, P patches of a crop, B crops in the network at a time.

Sources: Yang et al., arXiv:2204.08958; chaofengc/IQA-PyTorch at 01ae427 (archs/maniqa_arch.py,
uniform_crop); Kwai-Klear/AR-GRPO at 65947ad, reward_utils/maniqa.py.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from argrpo.data import Prompt
from argrpo.devices import DTYPES
from argrpo.model_paths import named_within
from argrpo.rewards.pyiqa_networks import build_metric
from argrpo.rewards.sharing import ImageMemo, Residence, SharedNetworks

CROP = 224  # pixels
_EPSILON = 1e-8  # of pyiqa, under the sum of weights
_READ_BLOCKS = 10  # of the ViT: features of blocks 6 to 9 are read
_FILES = {  # name in pyiqa: file
    "maniqa": "ckpt_koniq10k.pt",
    "maniqa-pipal": "MANIQA_PIPAL-ae6d356b.pth",
    "maniqa-kadid": "ckpt_kadid10k.pt",
}


class CropRule(NamedTuple):
    """Which crops an image is judged by, and how they become one score."""

    kind: str = "grid"  # or random
    num_crops: int = 20
    seed: int = 0  # of random crops


class ManiqaReward:
    """MANIQA, about 0 to 1."""

    def __init__(
        self,
        weights: str = "ckpt_koniq10k.pt",
        *,
        metric: str = "maniqa",
        crops: str = "grid",
        num_crops: int = 20,
        seed: int = 0,
        dtype: str = "float32",
        device: torch.device,
        reward_batch: int = 16,
        crop_batch: int = 32,
        offload: bool = False,
        shared: SharedNetworks | None = None,
        name: str = "maniqa",
    ) -> None:
        """Load the network.

        One argument for each option of the config, so more than is usual here.

        Args:
            weights: ckpt_koniq10k.pt of IIGROUP/MANIQA, or as published for `metric`.
            metric: maniqa (trained on KonIQ-10k), maniqa-pipal or maniqa-kadid.
            crops: grid or random; see the top of this file.
            num_crops: of each image, at least 1.
            seed: of random crops.
            dtype: of the network, float32 or bfloat16; averages are fp32.
            device: where it runs.
            reward_batch: images judged at a time.
            crop_batch: crops in the network at a time; bounds memory.
            offload: keep the weights on the CPU between steps.
            shared: networks of other judges.
            name: under which its scores are logged.

        Raises:
            ValueError: an option is none of these, or the file is of another network.
            FileNotFoundError: the file is not there.
        """
        self.name = name
        self.reward_batch = reward_batch
        self._rule = CropRule(crops, num_crops, seed)
        self._crop_batch = crop_batch
        place = f"rewards.{name}.options"
        _check(place, metric, weights, dtype, self._rule)

        def load() -> _Maniqa:
            with named_within(place):
                network = build_metric(metric, weights).network
            return _Maniqa(network, device, DTYPES[dtype], offload)

        key = (ManiqaReward, metric, weights, dtype, device, offload)
        self._network = (shared or SharedNetworks()).once(key, load)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts -> [N] fp32.

        Raises:
            ValueError: random crops of images that are no larger than a crop.
        """
        return self._network.scores(images, self._rule, self.reward_batch, self._crop_batch)

    def rest(self) -> None:
        """Off the device until it is asked again, with the option offload."""
        self._network.residence.rest()


class _Maniqa:
    """The network and what it said of the images seen last."""

    def __init__(
        self, network: Any, device: torch.device, dtype: torch.dtype, offload: bool
    ) -> None:
        network = network.to(dtype)
        network.vit.blocks = network.vit.blocks[:_READ_BLOCKS]
        self._network = network
        self.residence = Residence(network, device, offload=offload)
        self._device = device
        self._dtype = dtype
        self._memo = ImageMemo()

    def scores(self, images: Tensor, rule: CropRule, batch: int, crop_batch: int) -> Tensor:
        """[N] fp32."""

        def score(missing: Tensor, _: list[int]) -> Tensor:
            parts = [self._scores(part, rule, crop_batch) for part in missing.split(batch)]
            return torch.cat(parts)

        return self._memo.rows(images, (rule, batch, crop_batch), score)

    def _scores(self, images: Tensor, rule: CropRule, crop_batch: int) -> Tensor:
        self.residence.wake()
        images = images.to(self._device)
        corners = crop_corners(images, rule)
        pixels = as_maniqa(images)
        sums = [self._sums(crops) for crops in _crops(pixels, corners, crop_batch)]
        total, weight = torch.cat(sums).view(len(images), rule.num_crops, 2).unbind(-1)
        if rule.kind == "random":
            return (total / (weight + _EPSILON)).mean(dim=1)
        return total.sum(dim=1) / (weight.sum(dim=1) + _EPSILON)

    def _sums(self, crops: Tensor) -> Tensor:
        """[B, 3, 224, 224] -> [B, 2] fp32: sums over patches of weight times score, and weight."""
        score, weight = patch_scores(self._network, crops.to(self._dtype))
        return torch.stack([(score * weight).sum(dim=1), weight.sum(dim=1)], dim=1)


def patch_scores(network: Any, crops: Tensor) -> tuple[Tensor, Tensor]:
    """What the layers of pyiqa's MANIQA say of each patch, each crop for itself.

    Args:
        network: MANIQA of pyiqa, whose own call makes crops and averages of its own.
        crops: [B, 3, 224, 224] in [-1, 1].

    Returns:
        scores and weights, [B, P] fp32.
    """
    network.save_output.outputs.clear()
    network.vit(crops)  # its hooks keep what the blocks make
    x = network.extract_feature(network.save_output).transpose(1, 2)
    network.save_output.outputs.clear()
    grid = (network.input_size, network.input_size)
    stages = (
        (network.tablock1, network.conv1, network.swintransformer1),
        (network.tablock2, network.conv2, network.swintransformer2),
    )
    for token_attention, narrow, swin in stages:
        for block in token_attention:
            x = block(x)
        x = swin(narrow(x.unflatten(2, grid))).flatten(2)
    x = x.transpose(1, 2)
    return network.fc_score(x).squeeze(2).float(), network.fc_weight(x).squeeze(2).float()


def as_maniqa(images: Tensor) -> Tensor:
    """[N, 3, H, W] in [0, 1] -> in [-1, 1], and enlarged as pyiqa does where a crop would not fit
    in with room to move."""
    pixels = (images.float() - 0.5) / 0.5
    if min(pixels.shape[2:]) > CROP:
        return pixels
    return F.interpolate(
        pixels,
        scale_factor=(CROP + 1) / min(pixels.shape[2:]),
        mode="bilinear",
        align_corners=False,
    )


def crop_corners(images: Tensor, rule: CropRule) -> list[list[tuple[int, int]]]:
    """Top and left of the crops of each image.

    Raises:
        ValueError: random crops of images that are no larger than a crop.
    """
    height, width = images.shape[2:]
    if rule.kind == "grid":
        side = math.ceil(math.sqrt(rule.num_crops))
        enlarged = as_maniqa(images[:1]).shape[2:]
        down, right = ((size - CROP) // math.isqrt(rule.num_crops) for size in enlarged)
        grid = [(i * down, j * right) for i in range(side) for j in range(side)]
        return [grid[: rule.num_crops]] * len(images)
    if min(height, width) <= CROP:
        raise ValueError(
            f"images: expected more than {CROP} pixels a side for random crops, got "
            f"{height} x {width}; use crops: grid"
        )
    # One small copy from the device before a network that runs for seconds.
    return [
        _random_corners(height - CROP, width - CROP, rule, print_)
        for print_ in _fingerprints(images).tolist()
    ]


def _random_corners(tops: int, lefts: int, rule: CropRule, image: int) -> list[tuple[int, int]]:
    generator = torch.Generator().manual_seed((image ^ (rule.seed * 1_000_003)) % 2**63)
    top = torch.randint(tops, (rule.num_crops,), generator=generator).tolist()
    left = torch.randint(lefts, (rule.num_crops,), generator=generator).tolist()
    return list(zip(top, left, strict=True))


def _fingerprints(images: Tensor) -> Tensor:
    """[N] int64 that tell images apart by their 8-bit pixels; sums of integers, so in any order."""
    levels = (images.float() * 255.0).round().to(torch.int64).flatten(1)
    places = torch.arange(1, levels.shape[1] + 1, device=images.device)
    # Odd, from the golden ratio; products and sums wrap around.
    return (levels * (places * -7046029254386353131)).sum(dim=1)


def _crops(pixels: Tensor, corners: list[list[tuple[int, int]]], batch: int) -> Iterator[Tensor]:
    """Crops of all images in order, [up to `batch`, 3, 224, 224] at a time."""
    places = [(row, *corner) for row, some in enumerate(corners) for corner in some]
    for start in range(0, len(places), batch):
        yield torch.stack(
            [
                pixels[row, :, top : top + CROP, left : left + CROP]
                for row, top, left in places[start : start + batch]
            ]
        )


def _check(place: str, metric: str, weights: str, dtype: str, rule: CropRule) -> None:
    if metric not in _FILES:
        raise ValueError(f"{place}.metric: expected one of {', '.join(_FILES)}, got {metric!r}")
    if not Path(weights).is_file():
        raise FileNotFoundError(
            f"{place}.weights: expected {_FILES[metric]} (published in IIGROUP/MANIQA and "
            f"chaofengc/IQA-PyTorch-Weights), got nothing at {weights}"
        )
    if rule.kind not in ("grid", "random"):
        raise ValueError(f"{place}.crops: expected grid or random, got {rule.kind!r}")
    if rule.num_crops < 1:
        raise ValueError(f"{place}.num_crops: expected at least 1, got {rule.num_crops}")
    if dtype not in DTYPES:
        raise ValueError(f"{place}.dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
