"""LlamaGen: a decoder-only transformer over image tokens, class- or text-conditional.

The only definition of the model; the engine and the trainer differ in the `attend` they pass.
Parameter names are those of the published checkpoints, except that w1 and w3 are one packed
`w13` (split and joined by argrpo/models/loading.py).

Shapes: N images, P prefix positions, T image tokens, S positions, D width, V codebook.

Source: Sun et al., arXiv:2406.06525; FoundationVision/LlamaGen at ce98ec4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argrpo.engine.attention import Attend
from argrpo.engine.conditions import Conditions
from argrpo.engine.policy import PolicyShape, Prefix
from argrpo.engine.sampling_params import SamplingParams
from argrpo.kernels.rmsnorm import rmsnorm, rmsnorm_residual
from argrpo.kernels.swiglu import swiglu
from argrpo.models.attention_backends import AttentionName
from argrpo.models.conditioning import CaptionEmbedding, LabelEmbedding
from argrpo.models.hub import HubPolicy
from argrpo.models.residual_stack import run_stack
from argrpo.models.rotary import grid_rotary_table
from argrpo.models.scoring import drawn_logits, drawn_logprobs
from argrpo.models.training_attention import whole_image_hidden
from argrpo.setting_checks import at_least

_INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class LlamaGenConfig:
    """The sizes of a LlamaGen policy."""

    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    vocab_size: int
    image_size: int
    """Pixels a side of the images it draws; with `downsample` it fixes the token grid."""
    downsample: int = 16
    model_type: str = "c2i"
    """c2i: class labels; t2i: text features."""
    num_classes: int = 1000
    caption_dim: int = 2048
    prefix_len: int = 1
    text_padding: str = "left"
    """Where padding stands in a text: left (LlamaGen), or right (AR-GRPO's T2I policy)."""
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        at_least("downsample", self.downsample, 1)
        if self.num_heads < 1 or self.dim % self.num_heads or self.head_dim % 4:
            raise ValueError(
                "num_heads: expected a divisor of dim with a head size divisible by 4 "
                f"(a 2-D rotary embedding), got {self.num_heads} heads for dim {self.dim}"
            )
        if self.image_size < self.downsample or self.image_size % self.downsample:
            raise ValueError(
                f"image_size: expected a multiple of downsample {self.downsample}, "
                f"got {self.image_size}"
            )
        if self.model_type not in ("c2i", "t2i"):
            raise ValueError(f"model_type: expected c2i or t2i, got {self.model_type!r}")
        sides = ("left",) if self.model_type == "c2i" else ("left", "right")
        if self.text_padding not in sides:
            raise ValueError(
                f"text_padding: expected {' or '.join(sides)} for a {self.model_type} policy, "
                f"got {self.text_padding!r}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def grid_size(self) -> int:
        return self.image_size // self.downsample

    @property
    def num_image_tokens(self) -> int:
        return self.grid_size**2


class LlamaGen(HubPolicy, nn.Module):
    """A LlamaGen policy. See `argrpo.load_policy` for weights from disk."""

    has_null_condition = True
    image_places = None  # positions are in the rotary table

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoints_layers = False
        self.attention: AttentionName = "sdpa"
        self.end_sees_itself = True  # when scoring, see `whole_image_hidden`
        self._rotary = self._rotary_table()
        self.cls_embedding = (
            LabelEmbedding(config.num_classes, config.dim)
            if config.model_type == "c2i"
            else CaptionEmbedding(
                config.prefix_len, config.caption_dim, config.dim, config.text_padding
            )
        )
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(_Layer(config, i) for i in range(config.num_layers))
        self.norm = _RMSNorm(config)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.apply(_init_weights)

    @property
    def shape(self) -> PolicyShape:
        c = self.config
        return PolicyShape(
            c.num_layers, c.num_heads, c.head_dim, c.vocab_size, c.prefix_len, c.num_image_tokens
        )

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.tok_embeddings

    @property
    def head_weight(self) -> Tensor:
        return self.output.weight

    @property
    def rotary(self) -> Tensor:
        """[P + T, head_dim / 2, 2] fp32 cosines and sines, where the weights are.

        No buffer: `.to(bfloat16)` would round its angles, which reach the grid size, and a module
        that was built on the meta device would have none.
        """
        if self._rotary.device != self.head_weight.device:
            self._rotary = self._rotary_table().to(self.head_weight.device)
        return self._rotary

    def _rotary_table(self) -> Tensor:
        c = self.config
        return grid_rotary_table(c.grid_size, c.head_dim, prefix_len=c.prefix_len, base=c.rope_base)

    def check_conditions(self, conditions: Conditions) -> None:
        """ValueError by name if the conditions do not fit this model."""
        self.cls_embedding.check(conditions)

    def embed_conditions(self, conditions: Conditions) -> Prefix:
        """Conditions -> embeddings [N, P, D] and mask [N, P] of the prefix."""
        return self.cls_embedding.embed(conditions)

    def null_conditions(self, conditions: Conditions) -> Conditions:
        """The null condition of each row; a text's null keeps its mask, as LlamaGen's does."""
        return self.cls_embedding.null(conditions)

    def trunk(self, x: Tensor, attend: Attend) -> Tensor:
        """[N, S, D] embeddings -> [N, S, D] final-norm hidden states; as `run_stack`."""
        norms = [layer.get_submodule("attention_norm") for layer in self.layers]
        return run_stack(
            x,
            self.layers,
            [*norms, self.norm],
            attend,
            checkpoints_layers=self.checkpoints_layers,
        )

    def hidden(self, conditions: Conditions, token_ids: Tensor) -> Tensor:
        """Final-norm hidden states of given images; row t predicts token t. Differentiable.

        Args:
            conditions: labels [N] int64, or `TextFeatures` with N rows.
            token_ids: [N, T'] int64, T' <= T; the last column is not fed.

        Returns:
            [N, T', D] in the dtype of the weights.
        """
        return whole_image_hidden(self, conditions, token_ids, self.attention, self.end_sees_itself)

    def logits(
        self,
        conditions: Conditions,
        token_ids: Tensor,
        guidance_scale: float = 1.0,
        guidance_interval: int | None = None,
    ) -> Tensor:
        """Mixed logits before temperature and filters, at full size: for tests and small models.

        Args:
            conditions: labels [N] int64, or `TextFeatures` with N rows.
            token_ids: [N, T] int64 in 0 .. V - 1.
            guidance_scale: at least 1.
            guidance_interval: guide tokens 0 to guidance_interval + 1 only; None guides all.

        Returns:
            [N, T, V] fp32; row t predicts token t.
        """
        params = SamplingParams(guidance_scale=guidance_scale, guidance_interval=guidance_interval)
        return drawn_logits(self, conditions, token_ids, params)

    def logprobs(
        self,
        conditions: Conditions,
        token_ids: Tensor,
        params: SamplingParams,
        support: Tensor | None = None,
    ) -> Tensor:
        """Log-probs of given tokens under the distribution that `params` draws from.

        Differentiable; never holds [N, T, V].

        Args:
            conditions: labels [N] int64, or `TextFeatures` with N rows.
            token_ids: [N, T] int64 in 0 .. V - 1.
            params: guidance, temperature and filters. At temperature 0 a token is certain (0) if
                it is the likeliest, else impossible (-inf).
            support: [N, T, ceil(V / 8)] uint8 kept sets of the draw (`Rollout.support`). None with
                filters on: the kept sets are found again from these logits.

        Returns:
            [N, T] fp32.
        """
        return drawn_logprobs(self, conditions, token_ids, params, support)

    @staticmethod
    def published_names(key: str) -> tuple[str, ...]:
        """The published parameters that are the row blocks of one of ours, in order."""
        stem = key.removesuffix("feed_forward.w13")
        if stem == key:
            return (key,)
        return (f"{stem}feed_forward.w1.weight", f"{stem}feed_forward.w3.weight")


class _RMSNorm(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.weight, self.eps)

    def added(self, stream: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream with a block's update added, and its norm."""
        normed, total = rmsnorm_residual(update, stream, self.weight, self.eps)
        return total, normed


class _Attention(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)


class _FeedForward(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        # One parameter, because views of it would break under `.to` and deepcopy.
        self.w13 = nn.Parameter(torch.empty(2 * config.ffn_dim, config.dim).normal_(std=_INIT_STD))
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(F.linear(x, self.w13)))


class _Layer(nn.Module):
    def __init__(self, config: LlamaGenConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.attention = _Attention(config)
        self.feed_forward = _FeedForward(config)
        self.attention_norm = _RMSNorm(config)
        self.ffn_norm = _RMSNorm(config)

    def forward(
        self, stream: Tensor, normed: Tensor, attend: Attend, next_norm: _RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and its norm, from before this layer to before the next."""
        qkv = self.attention.wqkv(normed).unflatten(-1, (3, self.attention.num_heads, -1))
        stream, normed = self.ffn_norm.added(stream, self.attention.wo(attend(self.index, qkv)))
        return next_norm.added(stream, self.feed_forward(normed))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_INIT_STD)
