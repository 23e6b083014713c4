"""Agreement of an image with its text, by the cosine of two towers: CLIP score, HPSv2.1, PickScore.

Pixels are resized and normalised where they are, as one batch; an image is embedded once for all
judges that use the same tower, the text of a prompt once. A score means something within one
prompt, as in a group: the text decides its level.

Sources: Radford et al., arXiv:2103.00020; HPSv2, Wu et al., arXiv:2306.09341, tgxs002/HPSv2 at
866735e; PickScore, Kirstain et al., arXiv:2305.01569.
"""

from pathlib import Path

import torch
from torch import Tensor

from argrpo.data import Prompt
from argrpo.model_paths import named_within
from argrpo.rewards.sharing import SharedNetworks
from argrpo.rewards.tower_loading import TowerOptions, load_tower
from argrpo.rewards.tower_pixels import INTERPOLATIONS, ResizedAs
from argrpo.rewards.towers import Tower


class CosineReward:
    """Cosine similarity of image and text, times a factor.

    Args:
        name: under which its scores are logged.
        tower: embeds both.
        factor: 1 for a cosine in [-1, 1].
        reward_batch: images embedded at a time; bounds memory.
        interpolation: None: as the tower was trained.
        antialias: False only to follow a recipe that resizes tensors without.
        resized_as: picture or tensor, as the judge was published.
    """

    def __init__(
        self,
        name: str,
        tower: Tower,
        *,
        factor: float = 1.0,
        reward_batch: int = 64,
        interpolation: str | None = None,
        antialias: bool = True,
        resized_as: ResizedAs = "picture",
    ) -> None:
        self.name = name
        self.reward_batch = reward_batch
        self._tower = tower
        self._factor = factor
        self._pixels = tower.pixels._replace(
            antialias=antialias, resized_as=resized_as if antialias else "tensor"
        )
        if interpolation is not None:
            if interpolation not in INTERPOLATIONS:
                raise ValueError(
                    f"rewards.{name}.options.interpolation: expected one of "
                    f"{', '.join(INTERPOLATIONS)}, got {interpolation!r}"
                )
            self._pixels = self._pixels._replace(interpolation=interpolation)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Tensor:
        """[N, 3, H, W] in [0, 1] and N prompts -> [N] fp32."""
        texts = self._tower.texts([prompt.text for prompt in prompts], self.reward_batch)
        seen = self._tower.images(images, self._pixels, self.reward_batch)
        return self._factor * (seen * texts).sum(dim=1)

    def rest(self) -> None:
        """Off the device until it is asked again, with the option offload."""
        self._tower.rest()


class ClipReward(CosineReward):
    """CLIP score: the cosine, typically 0.2 to 0.35."""

    def __init__(
        self,
        model: str = "ViT-B-32-quickgelu",
        pretrained: str | None = None,
        *,
        tokenizer: str | None = None,
        interpolation: str | None = None,
        antialias: bool = True,
        dtype: str = "float32",
        device: torch.device,
        reward_batch: int = 64,
        offload: bool = False,
        shared: SharedNetworks | None = None,
        name: str = "clip",
    ) -> None:
        """Load the towers.

        One argument for each option of the config, so more than is usual here.

        Args:
            model: an architecture, a folder or a published name; see rewards/tower_loading.py.
            pretrained: weights of an architecture, a file or a tag; None: the tag openai.
            tokenizer: of a CLIP of transformers whose folder has none.
            interpolation: bicubic or bilinear; None: as the tower was trained.
            antialias: False only to follow a recipe that resizes tensors without.
            dtype: of the weights, float32 or bfloat16.
            device: where the towers run.
            reward_batch: images embedded at a time; bounds memory.
            offload: keep the weights on the CPU between steps.
            shared: networks of other judges.
            name: under which its scores are logged.

        Raises:
            ValueError: an option is none of these, or files are of something else.
            FileNotFoundError: a file is missing.
        """
        with named_within(f"rewards.{name}.options"):
            wanted = TowerOptions(model, pretrained, tokenizer, dtype, offload)
            tower = load_tower(wanted, shared or SharedNetworks(), device)
        super().__init__(
            name,
            tower,
            reward_batch=reward_batch,
            interpolation=interpolation,
            antialias=antialias,
        )


class Hpsv2Reward(CosineReward):
    """HPSv2.1: the cosine by a ViT-H/14 tuned on human choices, typically 0.25 to 0.32."""

    def __init__(
        self,
        checkpoint: str = "HPS_v2.1_compressed.pt",
        *,
        model: str = "ViT-H-14",
        dtype: str = "float32",
        device: torch.device,
        reward_batch: int = 32,
        offload: bool = False,
        shared: SharedNetworks | None = None,
        name: str = "hpsv2",
    ) -> None:
        """Load the towers.

        Args:
            checkpoint: HPS_v2.1_compressed.pt of xswu/HPSv2.
            model: the architecture of open_clip that it holds.
            dtype: of the weights, float32 or bfloat16.
            device: where the towers run.
            reward_batch: images embedded at a time; bounds memory.
            offload: keep the weights on the CPU between steps.
            shared: networks of other judges.
            name: under which its scores are logged.

        Raises:
            ValueError: the checkpoint holds something else.
            FileNotFoundError: the checkpoint is not there.
        """
        if not Path(checkpoint).is_file():
            raise FileNotFoundError(
                f"rewards.{name}.options.checkpoint: expected HPS_v2.1_compressed.pt (published in "
                f"xswu/HPSv2), got nothing at {checkpoint}"
            )
        with named_within(f"rewards.{name}.options"):
            wanted = TowerOptions(model, checkpoint, None, dtype, offload)
            tower = load_tower(wanted, shared or SharedNetworks(), device)
        super().__init__(name, tower, reward_batch=reward_batch, resized_as="tensor")


class PickScoreReward(CosineReward):
    """PickScore: the cosine by a ViT-H/14 tuned on users' picks, times the scale that it learned;
    typically 18 to 23."""

    def __init__(
        self,
        folder: str = "PickScore_v1",
        *,
        tokenizer: str | None = None,
        dtype: str = "float32",
        device: torch.device,
        reward_batch: int = 32,
        offload: bool = False,
        shared: SharedNetworks | None = None,
        name: str = "pickscore",
    ) -> None:
        """Load the towers.

        Args:
            folder: yuvalkirstain/PickScore_v1, a CLIP of transformers.
            tokenizer: laion/CLIP-ViT-H-14-laion2B-s32B-b79K, where `folder` has none.
            dtype: of the weights, float32 or bfloat16.
            device: where the towers run.
            reward_batch: images embedded at a time; bounds memory.
            offload: keep the weights on the CPU between steps.
            shared: networks of other judges.
            name: under which its scores are logged.

        Raises:
            ValueError: the folder holds something else.
            FileNotFoundError: the folder or one of its files is not there.
        """
        if not Path(folder).is_dir():
            raise FileNotFoundError(
                f"rewards.{name}.options.folder: expected a folder with PickScore (published in "
                f"yuvalkirstain/PickScore_v1), got nothing at {folder}"
            )
        with named_within(f"rewards.{name}.options"):
            wanted = TowerOptions(folder, None, tokenizer, dtype, offload)
            tower = load_tower(wanted, shared or SharedNetworks(), device)
        super().__init__(name, tower, factor=tower.logit_scale, reward_batch=reward_batch)
