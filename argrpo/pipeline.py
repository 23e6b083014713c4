"""A policy, its tokenizer and its text encoder behind one call, like diffusers' pipelines.

pipe = ImagePipeline.from_pretrained("c2i_L_256.pt", tokenizer="vq_ds16_c2i.pt", image_size=256)
images = pipe(class_labels=[207, 360], guidance_scale=2.0, seed=0).images
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from argrpo.devices import choose_device, choose_dtype
from argrpo.draw_seeds import draw_seeds
from argrpo.encoded_texts import TextLayout
from argrpo.engine.conditions import Conditions
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.model_paths import resolve_path
from argrpo.models.hub import local_path
from argrpo.models.image_policy import ImagePolicy
from argrpo.models.loading import holds_tokenizer, load_policy, load_tokenizer
from argrpo.models.pairing import check_guidance, check_pair
from argrpo.models.text_layout import text_layout
from argrpo.models.vq import VQTokenizer
from argrpo.pipeline_arguments import texts_of, whole_labels
from argrpo.pixels import to_uint8
from argrpo.run_prompts import encode_texts
from argrpo.sample_prompts import labels_of
from argrpo.text_config import TextEncoderConfig

Images: TypeAlias = list[Image.Image] | np.ndarray | Tensor
OutputType = Literal["pil", "np", "pt", "latent"]

_SLOTS = 8
_POLICY_FOLDER, _TOKENIZER_FOLDER = "policy", "tokenizer"  # as `argrpo convert taming` writes them

# Defaults of the sampling scripts that came with the models: LlamaGen's sample_c2i.py and
# sample_t2i.py at ce98ec4, the README of taming-transformers at 3ba01b2.
_CLASS_SETTINGS = SamplingParams(guidance_scale=4.0, top_k=2000)
_TEXT_SETTINGS = SamplingParams(guidance_scale=7.5, top_k=1000)
_TAMING_SETTINGS = SamplingParams(top_k=600, top_p=0.92)


@dataclass(frozen=True, slots=True, eq=False)
class ImagePipelineOutput:
    """What a call made."""

    images: Images
    """pil: a list of PIL images; np: [N, H, W, 3] fp32 in [0, 1]; pt: [N, 3, H, W] fp32 in [0, 1];
    latent: token ids [N, T] int64."""


class _TextSource(NamedTuple):
    """Where the features of prompts come from."""

    config: TextEncoderConfig
    layout: TextLayout
    cache_dir: str | None


class ImagePipeline:
    """Draws pictures of classes or texts. Made by `from_pretrained`."""

    def __init__(
        self,
        policy: ImagePolicy,
        tokenizer: VQTokenizer,
        *,
        max_slots: int = _SLOTS,
        texts: "_TextSource | None" = None,
    ) -> None:
        """
        Args:
            policy: draws token ids.
            tokenizer: makes pictures of them.
            max_slots: pictures drawn at a time. So many are always computed: a picture is then the
                same whatever is asked for beside it.
            texts: how prompts are encoded, for a text-conditional policy.

        Raises:
            ValueError: policy and tokenizer do not belong together, or `max_slots` is below 1.
        """
        check_pair(policy, tokenizer)
        self.policy, self.tokenizer = policy, tokenizer
        self._texts = texts
        self._max_slots = max_slots
        self._engine = RolloutEngine(policy, max_slots=max_slots)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        tokenizer: str | Path | None = None,
        text_encoder: str | None = None,
        image_size: int | None = None,
        num_heads: int | None = None,
        downsample: int = 16,
        text_padding: str | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        dtype: Literal["float32", "bfloat16"] = "float32",
        max_slots: int = _SLOTS,
        cache_dir: str | None = None,
    ) -> Self:
        """Read everything from disk, or from the hub. Over 8 arguments because there are three
        models to name, and a published file of a policy does not say its sizes.

        Args:
            name: what `argrpo.load_policy` takes, digits:policy, a repository of the hub as
                `owner/name`, or a folder that holds `policy` and `tokenizer`.
            tokenizer: what `argrpo.load_tokenizer` takes, or a repository; None where `name` holds
                one: AR-GRPO's folders and what `argrpo convert taming` writes.
            text_encoder: folder or hub id of the T5 of a text-conditional policy, as
                google/flan-t5-xl, or digits:text_encoder. It is read when a text is not among those
                kept on disk, and let go again; the policy stays beside it for that long.
            image_size, num_heads, downsample, text_padding: see `argrpo.load_policy`.
            device: auto takes a GPU where there is one.
            dtype: of the weights.
            max_slots: see `ImagePipeline`.
            cache_dir: where encoded texts and embedded models are kept; None: the usual place.

        Raises:
            FileNotFoundError: nothing stands at a path.
            ValueError: a file is no such model, a size is missing, or the parts do not fit.
        """
        source = _fetched(name, cache_dir)
        if (source / _POLICY_FOLDER).is_dir():
            tokenizer = source / _TOKENIZER_FOLDER if tokenizer is None else tokenizer
            source = source / _POLICY_FOLDER
        if tokenizer is None and not holds_tokenizer(source):
            raise ValueError(
                f"tokenizer: expected a path, because {name} holds a policy alone, got None"
            )
        codes = source if tokenizer is None else _fetched(tokenizer, cache_dir)
        where = choose_device(device)
        policy = load_policy(
            source,
            image_size=image_size,
            num_heads=num_heads,
            downsample=downsample,
            text_padding=text_padding,
            device=where,
            dtype=choose_dtype(dtype),
        )
        layout = text_layout(source, text_padding=policy.config.text_padding)
        texts = None
        if layout is not None:
            # One by one, so that a text's features do not depend on what is encoded beside it.
            config = TextEncoderConfig(path=text_encoder, batch=1)
            texts = _TextSource(config, layout, cache_dir)
        elif text_encoder is not None:
            raise ValueError(
                f"text_encoder: expected None for a policy of classes, got {text_encoder}"
            )
        codebook = load_tokenizer(codes, device=where, dtype=choose_dtype(dtype))
        return cls(policy, codebook, max_slots=max_slots, texts=texts)

    def to(self, device: str | torch.device) -> Self:
        """The same pipeline with its weights on another device."""
        self.policy.to(device)
        self.tokenizer.to(device)
        self._engine = RolloutEngine(self.policy, max_slots=self._max_slots)
        return self

    def get_label_ids(self, names: str | list[str]) -> list[int]:
        """Class labels of ImageNet's names, for `class_labels`; ValueError for an unknown one."""
        return labels_of([names] if isinstance(names, str) else names, "imagenet")

    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Images]:
        """Draw pictures; those of one prompt follow each other. The arguments are diffusers'.

        Args:
            class_labels: one or more classes, or
            prompt: one or more texts.
            guidance_scale: 1 is none; None, here and for the filters, takes the default of the
                sampling script that came with the model.
            temperature, top_k, top_p: see `SamplingParams`.
            num_images_per_prompt: pictures of each class or text.
            seed: one for all pictures, or a list of one a picture. A picture of a list depends on
                its own seed and prompt alone, whatever else is drawn.
            generator: in place of seeds, which are drawn from it, or from each of a list; None, as
                for seed, draws them from PyTorch's own.
            output_type: see `ImagePipelineOutput`.
            return_dict: False returns a tuple of the images instead of a record.

        Raises:
            ValueError: an argument out of range, or none or both of two that exclude each other.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type: expected pil, np, pt or latent, got {output_type!r}")
        default = self._default_settings()
        params = SamplingParams(
            guidance_scale=default.guidance_scale if guidance_scale is None else guidance_scale,
            temperature=temperature,
            top_k=default.top_k if top_k is None else top_k,
            top_p=default.top_p if top_p is None else top_p,
        )
        check_guidance(self.policy, "guidance_scale", params.guidance_scale)
        conditions, count = self._conditions(class_labels, prompt, num_images_per_prompt)
        seeds = draw_seeds(seed, generator, count)
        rollout = self._engine.draw(
            conditions, params, seed=seeds.draw, image_ids=torch.tensor(seeds.image_ids)
        )
        images = self._images(rollout.token_ids, output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _default_settings(self) -> SamplingParams:
        if not self.policy.has_null_condition:
            return _TAMING_SETTINGS
        is_text = self.policy.config.model_type == "t2i"
        return _TEXT_SETTINGS if is_text else _CLASS_SETTINGS

    def _conditions(
        self,
        class_labels: int | Sequence[int] | Tensor | None,
        prompt: str | Sequence[str] | None,
        repeats: int,
    ) -> tuple[Conditions, int]:
        """What each picture is drawn from, and how many there are."""
        asked = {"class_labels": class_labels, "prompt": prompt}
        given = [name for name, value in asked.items() if value is not None]
        wanted = "class_labels" if self._texts is None else "prompt"
        if given != [wanted]:
            raise ValueError(
                f"{wanted}: expected by this policy and nothing beside it, got "
                f"{' and '.join(given) or 'nothing'}"
            )
        if repeats < 1 or repeats != int(repeats):
            raise ValueError(
                f"num_images_per_prompt: expected a whole number of at least 1, got {repeats}"
            )
        if self._texts is None:
            labels = whole_labels(class_labels)
            return labels.repeat_interleave(repeats), len(labels) * repeats
        assert prompt is not None
        texts = texts_of(prompt)
        encoded = encode_texts(
            texts,
            self._texts.config,
            self._texts.layout,
            device=self.tokenizer.device,
            cache_dir=self._texts.cache_dir,
        )
        rows = torch.arange(len(texts)).repeat_interleave(repeats)
        return encoded.conditions(rows), len(rows)

    def _images(self, token_ids: Tensor, output_type: OutputType) -> Images:
        if output_type == "latent":
            return token_ids
        # One by one, because how a convolution rounds may depend on how many it is given.
        images = self.tokenizer.decode(token_ids, decode_batch=1)
        if output_type == "pt":
            return images
        rows = images.permute(0, 2, 3, 1).cpu()
        if output_type == "np":
            return rows.numpy()
        return [Image.fromarray(row) for row in to_uint8(rows).numpy()]


def _fetched(name: str | Path, cache_dir: str | None) -> Path:
    """Where a model lies: a path, a name of the embedded task, or a copy from the hub."""
    return local_path(resolve_path(str(name), cache_dir))
