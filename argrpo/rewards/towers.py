"""Towers: networks that put images and texts into one space.

An image of a batch is embedded once, whichever judges ask; a text once, as long as it is among the
last ones seen.

Shapes: N images or texts, C features.

Source: Radford et al., arXiv:2103.00020.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argrpo.rewards.sharing import ImageMemo, Residence
from argrpo.rewards.tower_pixels import TowerPixels, preprocess

_MAX_TEXTS = 50_000  # remembered; 200 MB at 1024 features


class TowerNetwork(Protocol):
    """The towers as a library has them."""

    module: nn.Module
    """All weights."""

    pixels: TowerPixels
    """What the image tower was trained on."""

    logit_scale: float
    """What cosines were multiplied with in training."""

    def encode_images(self, pixels: Tensor) -> Tensor:
        """[N, 3, size, size] preprocessed, in the weights' dtype -> [N, C]."""
        ...

    def encode_texts(self, texts: list[str]) -> Tensor:
        """N texts -> [N, C], where the weights are."""
        ...


class Tower:
    """Unit vectors of images and texts.

    Args:
        network: is frozen and moved.
        device: where it runs.
        dtype: of its weights; vectors are fp32 in any case.
        offload: keep the weights on the CPU between steps.
    """

    def __init__(
        self,
        network: TowerNetwork,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        network.module.to(dtype)
        self._residence = Residence(network.module, device, offload=offload)
        self._network = network
        self._device = device
        self._dtype = dtype
        self._images = ImageMemo()
        self._texts: dict[str, Tensor] = {}  # [C] each, in the order they were asked for

    @property
    def pixels(self) -> TowerPixels:
        """What the image tower was trained on."""
        return self._network.pixels

    @property
    def logit_scale(self) -> float:
        """What cosines were multiplied with in training."""
        return self._network.logit_scale

    def images(self, images: Tensor, pixels: TowerPixels, batch: int) -> Tensor:
        """Unit vectors of images.

        Args:
            images: [N, 3, H, W] floating point in [0, 1].
            pixels: how to preprocess them.
            batch: images in the tower at a time. A product may sum another number of rows in
                another order, so what was computed in other batches is not taken over.

        Returns:
            [N, C] fp32 on the device.
        """

        def embed(missing: Tensor, _: list[int]) -> Tensor:
            parts = [self._embed_images(part, pixels) for part in missing.split(batch)]
            return torch.cat(parts)

        return self._images.rows(images, (pixels, batch), embed)

    def texts(self, texts: list[str], batch: int) -> Tensor:
        """Unit vectors of N texts, `batch` at a time -> [N, C] fp32 on the device."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            self._residence.wake()
            encoded = self._network.encode_texts(part)
            self._texts.update(zip(part, F.normalize(encoded.float(), dim=1), strict=True))
        found = torch.stack([self._texts[text] for text in texts])
        for text in list(self._texts)[: max(len(self._texts) - _MAX_TEXTS, 0)]:
            del self._texts[text]
        return found

    def rest(self) -> None:
        """Off the device until it is asked again, where it is to be offloaded."""
        self._residence.rest()

    def _embed_images(self, images: Tensor, pixels: TowerPixels) -> Tensor:
        self._residence.wake()
        seen = preprocess(images.to(self._device), pixels).to(self._dtype)
        return F.normalize(self._network.encode_images(seen).float(), dim=1)
