"""What bench_rollout.py measures: our engine's step, and the least that a step needs.

A step feeds the last token of every image and draws the one at `position`, 1 to T - 1, over keys
and values of all positions before it. Weights are random at the published sizes.

Shapes: N images, T image tokens, D width, V codebook.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from engine_steps import steps_of
from roofline import StepSizes
from timing import captured
from torch import Tensor
from torch.nn import functional as F

from argrpo.engine.conditions import Conditions, TextFeatures
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig

NUM_CLASSES = 1000
VOCAB_SIZE = 16384
TEXT_WIDTH = 2048  # of FLAN-T5-XL's features
_GROUP = 8  # images a prompt, as training draws them
_PRODUCTS = (
    "attention.wqkv.weight",
    "attention.wo.weight",
    "feed_forward.w13",
    "feed_forward.w2.weight",
)


class PeerMissingError(Exception):
    """A peer cannot be built here; the message is for a person."""


@dataclass(frozen=True)
class Sizes:
    """A published policy: FoundationVision/LlamaGen at ce98ec4, autoregressive/models/gpt.py."""

    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int


MODELS = {
    "B": Sizes(768, 12, 12, 2048),
    "L": Sizes(1024, 24, 16, 2816),
    "XL": Sizes(1280, 36, 20, 3584),
    "XXL": Sizes(1536, 48, 24, 4096),
    "3B": Sizes(3200, 24, 32, 8704),
    "small": Sizes(256, 4, 4, 768),  # unpublished: whole draws of many images on a CPU
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """The work that is the same for all contenders."""

    model: str
    image_size: int
    images: int
    guidance_scale: float
    dtype: torch.dtype
    device: torch.device
    text_tokens: int = 0
    """Positions of a text prefix; 0 conditions on classes."""

    @property
    def num_tokens(self) -> int:
        return (self.image_size // 16) ** 2

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(guidance_scale=self.guidance_scale)

    @property
    def labels(self) -> Tensor:
        """[N] int64, spread over the classes."""
        return torch.arange(self.images, device=self.device) * 97 % NUM_CLASSES

    @property
    def conditions(self) -> Conditions:
        """Labels, or random features of prompts of many lengths, one prompt for 8 images."""
        if not self.text_tokens:
            return self.labels
        generator = torch.Generator().manual_seed(0)
        num_prompts, length = -(-self.images // _GROUP), self.text_tokens
        features = torch.randn(num_prompts, length, TEXT_WIDTH, generator=generator)
        padding = torch.randint(length, (num_prompts, 1), generator=generator)
        return TextFeatures(
            features.to(self.device),
            (torch.arange(length) >= padding).to(self.device),
            torch.arange(self.images, device=self.device) // _GROUP,
        )

    def policy(self) -> LlamaGen:
        """A policy of the published size with random weights."""
        sizes = MODELS[self.model]
        torch.manual_seed(0)
        config = LlamaGenConfig(
            dim=sizes.dim,
            num_layers=sizes.num_layers,
            num_heads=sizes.num_heads,
            ffn_dim=sizes.ffn_dim,
            vocab_size=VOCAB_SIZE,
            image_size=self.image_size,
            num_classes=NUM_CLASSES,
            model_type="t2i" if self.text_tokens else "c2i",
            caption_dim=TEXT_WIDTH,
            prefix_len=self.text_tokens or 1,
        )
        with self.device:  # 3B numbers take a GPU a moment and a CPU half a minute
            policy = LlamaGen(config)
        return policy.to(dtype=self.dtype).requires_grad_(False)

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values: the plain PyTorch path keeps them in fp32."""
        return self.dtype if self.device.type == "cuda" else torch.float32

    @property
    def step_sizes(self) -> StepSizes:
        sizes = MODELS[self.model]
        return StepSizes(
            *(sizes.dim, sizes.num_layers, sizes.ffn_dim, VOCAB_SIZE, self.images),
            num_branches=2 if self.is_guided else 1,
            itemsize=self.dtype.itemsize,
            cache_itemsize=self.cache_dtype.itemsize,
        )


class Contender(Protocol):
    """Something that draws images."""

    name: str

    def prepare(self) -> None:
        """Take the memory of a draw; keys and values of all positions are random."""
        ...

    def step(self, position: int) -> object: ...

    def finish(self) -> None:
        """No more steps until the next `prepare`."""
        ...

    def rollout(self) -> object:
        """Draw all tokens of all images."""
        ...


class OurEngine:
    """`RolloutEngine` on all images at once; gives log-probs and entropies beside the tokens."""

    name = "argrpo"

    def __init__(self, case: Case, policy: LlamaGen, *, deterministic: bool = False) -> None:
        self._policy = policy
        self._params, self._conditions = case.params, case.conditions
        self.engine = RolloutEngine(policy, max_slots=case.images, deterministic=deterministic)

    def prepare(self) -> None:
        self._steps = steps_of(self.engine, self._conditions, self._params)

    def step(self, position: int) -> object:
        return self._steps.step(position)

    def finish(self) -> None:
        self._steps.finish()

    def rollout(self) -> object:
        # As after an optimizer step: prefixes read with the former weights do not count.
        self._policy.norm.weight.mul_(1)
        return self.engine.draw(self._conditions, self._params, seed=0)


class Floor:
    """The matrix products and the attention of our step, and nothing else of it.

    As the library computes them: `linear` on the policy's own weights, batched products and a
    softmax over the filled part of a cache of as many bytes. On a GPU a step is a captured graph.
    """

    name = "floor"

    def __init__(self, case: Case, policy: LlamaGen) -> None:
        shape, width = policy.shape, policy.config.dim
        rows = case.images * (2 if case.is_guided else 1)
        weights = dict(policy.named_parameters())
        self._weights = [
            [weights[f"layers.{layer}.{name}"] for name in _PRODUCTS]
            for layer in range(shape.num_layers)
        ]
        self._head = policy.head_weight
        cache = shape.num_layers, rows, shape.num_heads, case.num_tokens, shape.head_dim
        self._keys, self._values = (
            torch.randn(cache, device=case.device, dtype=case.cache_dtype) for _ in range(2)
        )
        self._wide = _random(case, rows, 1, width)
        self._gated = _random(case, rows, 1, policy.config.ffn_dim)
        self._mixed = _random(case, case.images, width)
        queries = rows * shape.num_heads, 1, shape.head_dim
        self._queries = torch.randn(queries, device=case.device, dtype=case.cache_dtype)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._device = case.device

    def step(self, position: int) -> object:
        if self._device.type != "cuda":
            return self._products(position)
        if position not in self._graphs:
            self._graphs[position] = captured([partial(self._products, position)])
        self._graphs[position].replay()
        return None

    @torch.no_grad()
    def _products(self, position: int) -> Tensor:
        for layer, (wqkv, wo, w13, w2) in enumerate(self._weights):
            F.linear(self._wide, wqkv)
            keys = self._keys[layer].flatten(0, 1)[:, : position + 1]
            values = self._values[layer].flatten(0, 1)[:, : position + 1]
            scores = torch.bmm(self._queries, keys.transpose(1, 2))
            torch.bmm(scores.softmax(dim=-1), values)
            F.linear(self._wide, wo)
            F.linear(self._wide, w13)
            F.linear(self._gated, w2)
        return F.linear(self._mixed, self._head)


def _random(case: Case, *size: int) -> Tensor:
    return torch.randn(size, device=case.device, dtype=case.dtype)


def random_tokens(case: Case, count: int) -> Tensor:
    """[count] int64 token ids."""
    return torch.randint(VOCAB_SIZE, (count,), device=case.device)
