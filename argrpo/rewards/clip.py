"""Agreement of an image with its text, by CLIP towers: CLIP score and HPSv2.1.

Both are the cosine between the image and the text embedding, through open_clip. Pixels are resized
and normalised where they are, as one batch; the text of a prompt is embedded once.

Sources: Radford et al., arXiv:2103.00020; HPSv2, Wu et al., arXiv:2306.09341, whose preprocessing
resizes the tensor (bicubic, antialiased) before it crops, tgxs002/HPSv2 at 866735e.
"""

from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as VF

from argrpo.data import Prompt


class ClipReward:
    """Cosine similarity in [-1, 1], typically 0.2 to 0.35."""

    name = "clip"

    def __init__(
        self,
        model: str = "ViT-B-32-quickgelu",
        pretrained: str = "openai",
        *,
        device: torch.device,
        reward_batch: int = 64,
    ) -> None:
        """Load the towers.

        Args:
            model: an open_clip architecture; OpenAI's weights want one ending in -quickgelu.
            pretrained: a file with its weights, or a tag that open_clip knows (fetched once).
            device: where the towers run.
            reward_batch: images embedded at a time; bounds memory.

        Raises:
            ValueError: no such architecture, or `pretrained` is neither a file nor a known tag.
        """
        if model not in open_clip.list_models():
            raise ValueError(f"model: expected an open_clip architecture, got {model!r}")
        tags = open_clip.list_pretrained_tags_by_model(model)
        if not Path(pretrained).is_file() and pretrained not in tags:
            raise ValueError(
                f"pretrained: expected a file or one of {', '.join(tags) or 'no tag'} "
                f"for {model}, got {pretrained!r}"
            )
        self._model = open_clip.create_model(model, pretrained, device=device).eval()
        self._model.requires_grad_(False)
        self._pixels = TowerPixels.of(self._model)
        self._tokenizer = open_clip.get_tokenizer(model)
        self._device = device
        self._reward_batch = reward_batch
        self._texts: dict[str, Tensor] = {}  # normalised embedding of each text seen

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts -> [N] fp32 cosines."""
        texts = [prompt.text for prompt in prompts]
        self._embed_texts(sorted(set(texts) - self._texts.keys()))
        text = torch.stack([self._texts[text] for text in texts])
        parts = [self._embed_images(part) for part in images.split(self._reward_batch)]
        return (torch.cat(parts) * text).sum(dim=1)

    def _embed_texts(self, texts: list[str]) -> None:
        for start in range(0, len(texts), self._reward_batch):
            part = texts[start : start + self._reward_batch]
            embedded = self._model.encode_text(self._tokenizer(part).to(self._device)).float()
            self._texts.update(zip(part, F.normalize(embedded, dim=1), strict=True))

    def _embed_images(self, images: Tensor) -> Tensor:
        pixels = preprocess(images.to(self._device), self._pixels)
        return F.normalize(self._model.encode_image(pixels).float(), dim=1)


class Hpsv2Reward(ClipReward):
    """HPSv2.1: the same cosine by a ViT-H/14 tuned on human choices, typically 0.25 to 0.32.

    Compare scores only within one prompt, as a group does.
    """

    name = "hpsv2"

    def __init__(self, checkpoint: str, *, device: torch.device, reward_batch: int = 32) -> None:
        """Load the towers.

        Args:
            checkpoint: HPS_v2.1_compressed.pt of xswu/HPSv2.
            device: where the towers run.
            reward_batch: images embedded at a time; bounds memory.

        Raises:
            FileNotFoundError: the checkpoint is not there.
        """
        if not Path(checkpoint).is_file():
            raise FileNotFoundError(
                f"rewards.hpsv2.options.checkpoint: expected HPS_v2.1_compressed.pt (published in "
                f"xswu/HPSv2), got {checkpoint}"
            )
        super().__init__("ViT-H-14", checkpoint, device=device, reward_batch=reward_batch)


class TowerPixels(NamedTuple):
    """What an image tower wants to see."""

    size: int  # pixels a side
    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]

    @classmethod
    def of(cls, model: torch.nn.Module) -> "TowerPixels":
        wanted = open_clip.get_model_preprocess_cfg(model)
        size = wanted["size"]
        side = size if isinstance(size, int) else min(size)
        return cls(side, tuple(wanted["mean"]), tuple(wanted["std"]))


def preprocess(images: Tensor, pixels: TowerPixels) -> Tensor:
    """[N, 3, H, W] in [0, 1] -> [N, 3, size, size], resized, cropped and normalised."""
    resized = VF.resize(
        images.float(),
        [pixels.size],
        interpolation=VF.InterpolationMode.BICUBIC,
        antialias=True,
    )
    cropped = VF.center_crop(resized, [pixels.size, pixels.size])
    return VF.normalize(cropped, list(pixels.mean), list(pixels.std))
