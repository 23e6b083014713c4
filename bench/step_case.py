"""The work of bench_step.py: one training step, the same for all contenders.

    draw N images with guidance -> pixels -> judges -> log-probs of a reference -> one update

Policy, tokenizer and judges have the published sizes and random weights. Judges are image towers of
CLIP's shape whose score is the cosine to a vector of the class: what a CLIP or HPSv2.1 reward
computes, without files. Their pixels are prepared on the device for everybody.

Shapes: N images, T image tokens, H x W pixels.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from rollout_contenders import Case
from torch import Tensor
from torch.nn import functional as F

from argrpo.advantages import Advantages, group_advantages
from argrpo.config import PolicyConfig, TokenizerConfig, TrainConfig
from argrpo.models.vq import VQConfig, VQTokenizer
from argrpo.objective_config import ObjectiveConfig
from argrpo.reward_config import RewardConfig
from argrpo.step_clock import StepClock

BETA = 0.1  # of the KL, and below: AR-GRPO's class-conditional run
_PIXELS = 224
_MEAN, _STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)  # of CLIP's images


@dataclass(frozen=True)
class TowerSizes:
    """Of an image tower."""

    width: int
    num_layers: int
    num_heads: int
    patch: int
    embedding: int


TOWERS = {
    "clip": TowerSizes(768, 12, 12, 32, 512),  # ViT-B/32
    "hpsv2": TowerSizes(1280, 32, 16, 14, 1024),  # ViT-H/14
    "tiny": TowerSizes(32, 1, 2, 56, 16),
}
TOKENIZERS = {
    "VQ-16": VQConfig(),
    "tiny": VQConfig(
        channels=32, z_channels=32, encoder_multipliers=(1,) * 5, decoder_multipliers=(1,) * 5,
        num_res_blocks=1,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """A step of GRPO."""

    draw: Case
    group: int  # images a prompt
    micro_batch: int  # images of a forward and backward pass
    judges: tuple[str, ...]
    tokenizer: str = "VQ-16"
    clock: str = "wall"  # or process, see timing.ProcessClock

    @property
    def name(self) -> str:
        draw = self.draw
        return (
            f"step {draw.model} {draw.image_size} px, {draw.images} images, guidance "
            f"{draw.guidance_scale:g}, judges {' '.join(self.judges)}"
        )

    @property
    def labels(self) -> Tensor:
        """[N] int64, the images of a class next to each other."""
        return self.draw.labels[:: self.group].repeat_interleave(self.group)

    def make_tokenizer(self) -> VQTokenizer:
        """Random weights, the dtype of the policy."""
        torch.manual_seed(1)
        with self.draw.device:
            tokenizer = VQTokenizer(TOKENIZERS[self.tokenizer])
        return tokenizer.to(dtype=self.draw.dtype).eval().requires_grad_(False)

    def make_clock(self) -> StepClock:
        """Splits a step into its phases."""
        seconds = time.process_time if self.clock == "process" else time.perf_counter
        return StepClock(self.draw.device, seconds=seconds)

    def make_judges(self) -> "Judges":
        return Judges([Tower(name, self.draw) for name in self.judges])

    def advantages(self, scores: Tensor) -> Advantages:
        """[N] summed scores, each against those of its class."""
        return group_advantages(scores.view(-1, self.group))

    @property
    def config(self) -> TrainConfig:
        """AR-GRPO's way of training, for the part of the trainer that learns."""
        dtype = "bfloat16" if self.draw.dtype == torch.bfloat16 else "float32"
        return TrainConfig(
            output_dir="",
            policy=PolicyConfig(path="", dtype=dtype),
            tokenizer=TokenizerConfig(path=""),
            rewards=[RewardConfig(name=name) for name in self.judges],
            prompts_per_step=self.draw.images // self.group,
            images_per_prompt=self.group,
            micro_batch=self.micro_batch,
            rollout=self.draw.params,
            objective=ObjectiveConfig(beta=BETA),
        )


class Tower:
    """An image tower of transformers, with random weights."""

    def __init__(self, name: str, case: Case) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        sizes = TOWERS[name]
        config = CLIPVisionConfig(
            hidden_size=sizes.width,
            intermediate_size=4 * sizes.width,
            projection_dim=sizes.embedding,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            image_size=_PIXELS,
            patch_size=sizes.patch,
        )
        torch.manual_seed(2)
        with case.device:
            model = CLIPVisionModelWithProjection(config)
        self._model = model.to(dtype=case.dtype).eval().requires_grad_(False)
        self._dtype = case.dtype
        self._mean, self._std = (
            torch.tensor(values, device=case.device).view(3, 1, 1) for values in (_MEAN, _STD)
        )
        texts = torch.randn(1000, sizes.embedding, generator=torch.Generator().manual_seed(3))
        self._texts = F.normalize(texts, dim=-1).to(case.device)

    @torch.no_grad()
    def score(self, images: Tensor, labels: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] and [N] classes -> [N] fp32 cosines."""
        size = (_PIXELS, _PIXELS)
        small = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = ((small - self._mean) / self._std).to(self._dtype)
        embedded = self._model(pixel_values=pixels).image_embeds.float()
        return (F.normalize(embedded, dim=-1) * self._texts[labels]).sum(dim=-1)


class Judges:
    """All towers; the score of an image is their sum."""

    def __init__(self, towers: Sequence[Tower]) -> None:
        self._towers = towers

    def together(self, images: Tensor, labels: Tensor) -> Tensor:
        """[N] scores, all images as one batch."""
        return torch.stack([tower.score(images, labels) for tower in self._towers]).sum(dim=0)

    def one_by_one(self, images: Tensor, labels: Tensor) -> Tensor:
        """[N] scores, a forward pass an image and tower, each score read back."""
        sums = [0.0] * len(images)
        for tower in self._towers:
            for i in range(len(images)):
                sums[i] += tower.score(images[i : i + 1], labels[i : i + 1]).item()
        return torch.tensor(sums, device=images.device)


class StepContender(Protocol):
    """Something that trains."""

    name: str
    facts: dict[str, str]
    """What its row says beside the figures: `how` it makes a step."""

    def run(self, seed: int) -> dict[str, float]:
        """One step; seconds of the whole (`step_time`) and of each phase (`time/NAME`)."""
        ...
