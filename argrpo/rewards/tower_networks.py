"""Towers as two libraries have them: open_clip's, and the CLIP of transformers.

Shapes: N images or texts, C features.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor, nn

from argrpo.rewards.clip_processor import processor_pixels
from argrpo.rewards.tower_pixels import INTERPOLATIONS, TowerPixels


class OpenClipNetwork:
    """Towers of open_clip.

    Args:
        model: an architecture, or a folder with local-dir: or hf-hub: in front.
        pretrained: a file or a tag; None for a folder, or for an architecture with random weights.

    Raises:
        ValueError: its pictures want what is not done here.
    """

    def __init__(self, model: str, pretrained: str | None) -> None:
        # Without require_pretrained a folder that lacks weights gives random ones, too.
        is_random = pretrained is None and model in open_clip.list_models()
        self.module: nn.Module = open_clip.create_model(
            model, pretrained, require_pretrained=not is_random, weights_only=True
        )
        self._tokenizer = open_clip.get_tokenizer(model)
        self.pixels = _pixels(open_clip.get_model_preprocess_cfg(self.module))
        self.logit_scale = float(self.module.logit_scale.detach().exp())

    def encode_images(self, pixels: Tensor) -> Tensor:
        """[N, 3, size, size] -> [N, C]."""
        encoded: Tensor = self.module.encode_image(pixels)  # type: ignore[operator]
        return encoded

    def encode_texts(self, texts: list[str]) -> Tensor:
        """N texts -> [N, C]."""
        tokens = self._tokenizer(texts).to(_device_of(self.module))
        encoded: Tensor = self.module.encode_text(tokens)  # type: ignore[operator]
        return encoded


class TransformersNetwork:
    """A CLIP of transformers.

    Args:
        model: a folder with config.json and weights, or a name on the hub.
        tokenizer: a folder with the tokenizer's files, or a name on the hub.

    Raises:
        ValueError: the weights are not all there, or its pictures want what is not done here.
    """

    def __init__(self, model: str, tokenizer: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        read: Any = CLIPModel.from_pretrained(
            model, local_files_only=Path(model).is_dir(), output_loading_info=True
        )
        self.module: nn.Module
        self.module, loaded = read
        # transformers fills what a file lacks with random numbers.
        if loaded["missing_keys"]:
            missing = ", ".join(sorted(loaded["missing_keys"])[:3])
            raise ValueError(f"expected a CLIP of transformers, got {model} without {missing}")
        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            tokenizer, local_files_only=Path(tokenizer).is_dir()
        )
        config: Any = self.module.config
        self._max_tokens = config.text_config.max_position_embeddings
        self.pixels = processor_pixels(model, config.vision_config.image_size)
        self.logit_scale = float(self.module.logit_scale.detach().exp())  # type: ignore[operator]

    def encode_images(self, pixels: Tensor) -> Tensor:
        """[N, 3, size, size] -> [N, C]."""
        return pooled(self.module.get_image_features(pixel_values=pixels))  # type: ignore[operator]

    def encode_texts(self, texts: list[str]) -> Tensor:
        """N texts -> [N, C]."""
        tokens = self._tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
        ).to(_device_of(self.module))
        return pooled(
            self.module.get_text_features(  # type: ignore[operator]
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
        )


def pooled(features: Any) -> Tensor:
    """The embedding in what a CLIPModel's get_*_features returns: itself up to transformers 4, a
    field of a record since 5."""
    found: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return found


def _pixels(wanted: Mapping[str, Any]) -> TowerPixels:
    """What open_clip's description of pictures asks for.

    Raises:
        ValueError: it is not done here.
    """
    size, mode, interpolation = (wanted[key] for key in ("size", "resize_mode", "interpolation"))
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1 or mode not in ("shortest", "squash") or interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"expected pictures of equal sides, resized by the shortest or squashed, "
            f"{' or '.join(INTERPOLATIONS)}, got {size}, {mode}, {interpolation}"
        )
    squash = mode == "squash"
    mean, std = tuple(wanted["mean"]), tuple(wanted["std"])
    return TowerPixels(sides.pop(), mean, std, interpolation, squash=squash)


def _device_of(module: nn.Module) -> Any:
    return next(module.parameters()).device
