"""What bench_rewards.py measures: judges with random weights, pixels, a training step.

Shapes: N images.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from rollout_contenders import MODELS, VOCAB_SIZE, Case
from torch import Tensor
from torchvision.transforms import functional as VF

from argrpo.config import TrainConfig
from argrpo.data import Prompt
from argrpo.data_config import DataConfig
from argrpo.engine.sampling_params import SamplingParams
from argrpo.model_config import PolicyConfig, TokenizerConfig
from argrpo.models.loading import save_policy, save_tokenizer
from argrpo.models.vq import VQConfig, VQTokenizer
from argrpo.output_config import OutputConfig
from argrpo.reward_config import RewardConfig
from argrpo.rewards.clip import CosineReward
from argrpo.rewards.image_transfer import pil_images
from argrpo.rewards.protocols import Reward
from argrpo.rewards.tower_networks import OpenClipNetwork
from argrpo.rewards.tower_pixels import TowerPixels, preprocess
from argrpo.rewards.towers import Tower
from argrpo.trainer import Trainer

_GROUP = 8  # images a prompt
_SERVER = Path(__file__).parent / "fake_judge_server.py"

TOWERS = {"clip_b32": "ViT-B-32-quickgelu", "clip_l14": "ViT-L-14-quickgelu", "hpsv2": "ViT-H-14"}


def make_tower_judge(name: str, batch: int, device: torch.device, dtype: torch.dtype) -> Reward:
    """CLIP score or HPSv2 at the published size with random weights."""
    torch.manual_seed(0)
    tower = Tower(OpenClipNetwork(TOWERS[name], None), device=device, dtype=dtype)
    return CosineReward(name, tower, reward_batch=batch)


def make_maniqa(
    batch: int, device: torch.device, dtype: torch.dtype, *, num_crops: int, folder: Path
) -> Reward:
    """MANIQA with random weights.

    Args:
        batch: images at a time.
        device: where it runs.
        dtype: of its weights.
        num_crops: of an image.
        folder: where its weights are written, to be read as a published file.
    """
    import timm
    from pyiqa.models.inference_model import InferenceModel

    from argrpo.rewards.maniqa import ManiqaReward

    create = timm.create_model
    torch.manual_seed(0)
    # pyiqa would fetch the backbone, whatever it is told.
    with patch("timm.create_model", lambda kind, pretrained: create(kind, pretrained=False)):
        metric = InferenceModel(
            "maniqa", device=torch.device("cpu"), check_input_range=False, pretrained=False
        )
    with torch.no_grad():  # away from where a random network's last ReLU gives 0
        metric.net.fc_score[3].bias.fill_(0.5)
    torch.save(metric.net.state_dict(), folder / "maniqa.pt")
    name = str(dtype).removeprefix("torch.")
    return ManiqaReward(
        str(folder / "maniqa.pt"),
        num_crops=num_crops,
        dtype=name,
        device=device,
        reward_batch=batch,
        crop_batch=batch * num_crops,
    )


def judge_calls(judge: Reward, images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """All images in a batch, and one at a time, prompts known to both."""
    prompts = [Prompt(f"a photo of thing {row // _GROUP}") for row in range(len(images))]

    def batched() -> Tensor:
        # A copy, because judges remember what they made of images that they have seen.
        return judge(images.clone(), prompts)

    def one_at_a_time() -> Tensor:
        fresh = images.clone()
        return torch.cat([judge(fresh[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))])

    return {"batched": batched, "one_at_a_time": one_at_a_time}


def pixel_calls(images: Tensor, size: int) -> dict[str, Callable[[], Tensor]]:
    """Images to a tower's input: the batch as one tensor, and each as a Pillow picture."""
    pixels = TowerPixels(size)

    def as_tensor() -> Tensor:
        return preprocess(images, pixels)

    def as_pictures() -> Tensor:
        return torch.stack([_from_picture(picture, pixels) for picture in pil_images(images)])

    return {"tensor": as_tensor, "pillow": as_pictures}


def _from_picture(picture: object, pixels: TowerPixels) -> Tensor:
    """What open_clip's own transform does, in its order."""
    resized = VF.resize(picture, [pixels.size], interpolation=VF.InterpolationMode.BICUBIC)
    cropped = VF.center_crop(resized, [pixels.size, pixels.size])
    return VF.normalize(VF.to_tensor(cropped), list(pixels.mean), list(pixels.std))


@contextmanager
def slow_server(latency_s: float) -> Iterator[str]:
    """The address of a judge's server whose answers take so long."""
    command = [sys.executable, "-P", str(_SERVER), "--latency_s", str(latency_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def left_over_right(images: Tensor, prompts: list[Prompt]) -> Tensor:
    """A local judge that costs nothing."""
    left, right = images.chunk(2, dim=3)
    return left.mean(dim=(1, 2, 3)) - right.mean(dim=(1, 2, 3))


def save_models(case: Case, folder: Path) -> None:
    """A policy of the case's size and a tokenizer that fits; published sizes on a GPU alone."""
    save_policy(case.policy(), folder / "policy")
    torch.manual_seed(0)
    wide = case.device.type == "cuda"
    config = VQConfig(codebook_size=VOCAB_SIZE)
    small = replace(config, channels=32, z_channels=64, num_res_blocks=1)
    save_tokenizer(VQTokenizer(config if wide else small), folder / "tokenizer")


def make_trainer(
    case: Case, folder: Path, slots: int, url: str | None, *, draw_ahead: bool = False
) -> Trainer:
    """A run on the saved models, with a server among its judges where there is an address."""
    rewards = [RewardConfig(name="reward_cases:left_over_right")]
    if url is not None:
        rewards.append(
            RewardConfig(name="vlm_server", options={"url": url, "model": "fake"}, weight=0.1)
        )
    dtype = str(case.dtype).removeprefix("torch.")
    config = TrainConfig(
        output_dir=str(folder / f"run_{url is not None}_{draw_ahead}"),
        policy=PolicyConfig(
            path=str(folder / "policy"), num_heads=MODELS[case.model].num_heads, dtype=dtype
        ),
        tokenizer=TokenizerConfig(path=str(folder / "tokenizer"), dtype=dtype),
        data=DataConfig(names="imagenet"),
        rewards=rewards,
        prompts_per_step=case.images // _GROUP,
        images_per_prompt=_GROUP,
        num_steps=1_000,
        micro_batch=8,
        max_slots=slots,
        draw_ahead=draw_ahead,
        rollout=SamplingParams(guidance_scale=case.guidance_scale),
        output=OutputConfig(trackers=[]),
        device=case.device.type,
    )
    return Trainer(config, [])


def take_step(trainer: Trainer, step: int) -> dict[str, float]:
    """One step of a run, without what `train` does around it, so that two runs can take turns.

    Args:
        trainer: as `make_trainer` gave it.
        step: 0-based; the one after the last that was taken.

    Returns:
        Its metrics.
    """
    outcome = trainer._step.run(step, is_monitored=lambda _: False)
    trainer._step.commit()
    return outcome.metrics
