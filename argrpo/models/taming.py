"""The class-conditional transformer of taming-transformers: a minGPT over VQGAN tokens.

Class tokens are rows of the token embedding, ids 0 to num_classes - 1; positions are learned, the
class at position 0. There is no null class, hence no guidance. Parameter names are those of the
published checkpoints, except that query, key and value are one packed `qkv` (split and joined by
argrpo/models/loading.py).

Shapes: N images, T image tokens, S positions, D width, V codebook.

Source: Esser, Rombach and Ommer, arXiv:2012.09841; CompVis/taming-transformers at 3ba01b2,
modules/transformer/mingpt.py and models/cond_transformer.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from argrpo.engine.attention import Attend
from argrpo.engine.conditions import Conditions, TextFeatures
from argrpo.engine.policy import PolicyShape, Prefix
from argrpo.engine.sampling_params import SamplingParams
from argrpo.kernels.gelu import bias_gelu
from argrpo.kernels.layernorm import layernorm, layernorm_residual
from argrpo.models.attention_backends import AttentionName
from argrpo.models.conditioning import check_labels
from argrpo.models.hub import HubPolicy
from argrpo.models.residual_stack import run_stack
from argrpo.models.scoring import drawn_logits, drawn_logprobs
from argrpo.models.training_attention import whole_image_hidden
from argrpo.setting_checks import at_least

_INIT_STD = 0.02
_NORM_EPS = 1e-5  # PyTorch's default, which minGPT takes
_QKV = ("query", "key", "value")  # in the order of the packed rows


@dataclass(frozen=True, kw_only=True)
class TamingConfig:
    """The sizes of a taming transformer."""

    dim: int
    num_layers: int
    num_heads: int
    vocab_size: int
    image_size: int
    """Pixels a side of the images it draws; with `downsample` it fixes the token grid."""
    downsample: int = 16
    num_classes: int = 1000
    num_positions: int = 256
    """Learned positions: the class and all image tokens that are fed, or more."""

    def __post_init__(self) -> None:
        at_least("downsample", self.downsample, 1)
        if self.num_heads < 1 or self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                "num_heads: expected a divisor of dim with an even head size, "
                f"got {self.num_heads} heads for dim {self.dim}"
            )
        if self.image_size < self.downsample or self.image_size % self.downsample:
            raise ValueError(
                f"image_size: expected a multiple of downsample {self.downsample}, "
                f"got {self.image_size}"
            )
        if self.num_positions < self.num_image_tokens:
            raise ValueError(
                f"image_size: expected at most {self.num_positions} tokens, as many as learned "
                f"positions, got {self.num_image_tokens}"
            )
        if not 1 <= self.num_classes <= self.vocab_size:
            raise ValueError(
                f"num_classes: expected 1 to {self.vocab_size}, since a class is a row of the "
                f"token embedding, got {self.num_classes}"
            )

    @property
    def model_type(self) -> str:
        return "c2i"

    @property
    def text_padding(self) -> str:
        return "left"

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def grid_size(self) -> int:
        return self.image_size // self.downsample

    @property
    def num_image_tokens(self) -> int:
        return self.grid_size**2


class Taming(HubPolicy, nn.Module):
    """A taming policy. See `argrpo convert taming` for weights from a published checkpoint."""

    has_null_condition = False
    rotary = None

    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoints_layers = False
        self.attention: AttentionName = "sdpa"
        self.end_sees_itself = True  # concerns padded texts alone
        self.tok_emb = nn.Embedding(config.vocab_size, config.dim)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.num_positions, config.dim))
        self.blocks = nn.ModuleList(_Block(config, i) for i in range(config.num_layers))
        self.ln_f = _LayerNorm(config)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.apply(_init_weights)

    @property
    def shape(self) -> PolicyShape:
        c = self.config
        return PolicyShape(
            c.num_layers, c.num_heads, c.head_dim, c.vocab_size, 1, c.num_image_tokens
        )

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.tok_emb

    @property
    def image_places(self) -> Tensor:
        """[num_positions - 1, D]: position 0 is the class's."""
        return self.pos_emb[0, 1:]

    @property
    def head_weight(self) -> Tensor:
        return self.head.weight

    def check_conditions(self, conditions: Conditions) -> None:
        """ValueError by name if the conditions are not class labels of this model."""
        check_labels(conditions, self.config.num_classes)

    def embed_conditions(self, conditions: Conditions) -> Prefix:
        """Labels -> embeddings [N, 1, D] and mask [N, 1] of the prefix."""
        assert not isinstance(conditions, TextFeatures)
        mask = torch.ones(len(conditions), 1, dtype=torch.bool, device=conditions.device)
        return Prefix(self.tok_emb(conditions)[:, None] + self.pos_emb[:, :1], mask)

    def null_conditions(self, conditions: Conditions) -> Conditions:
        """There are none: ValueError."""
        raise ValueError(
            "guidance_scale: expected 1, because a taming policy was trained without a null class "
            "to be guided by, got guidance"
        )

    def trunk(self, x: Tensor, attend: Attend) -> Tensor:
        """[N, S, D] embeddings -> [N, S, D] final-norm hidden states; as `run_stack`."""
        norms = [block.get_submodule("ln1") for block in self.blocks]
        return run_stack(
            x,
            self.blocks,
            [*norms, self.ln_f],
            attend,
            checkpoints_layers=self.checkpoints_layers,
        )

    def hidden(self, conditions: Conditions, token_ids: Tensor) -> Tensor:
        """[N, T', D] final-norm hidden states of given images; as `LlamaGen.hidden`."""
        return whole_image_hidden(self, conditions, token_ids, self.attention, self.end_sees_itself)

    def logits(
        self,
        conditions: Conditions,
        token_ids: Tensor,
        guidance_scale: float = 1.0,
        guidance_interval: int | None = None,
    ) -> Tensor:
        """[N, T, V] fp32 logits of given images, as `LlamaGen.logits`; any guidance is refused."""
        params = SamplingParams(guidance_scale=guidance_scale, guidance_interval=guidance_interval)
        return drawn_logits(self, conditions, token_ids, params)

    def logprobs(
        self,
        conditions: Conditions,
        token_ids: Tensor,
        params: SamplingParams,
        support: Tensor | None = None,
    ) -> Tensor:
        """[N, T] fp32 log-probs of given tokens under what `params` draws from; as
        `LlamaGen.logprobs`, without guidance."""
        return drawn_logprobs(self, conditions, token_ids, params, support)

    @staticmethod
    def published_names(key: str) -> tuple[str, ...]:
        """The published parameters that are the row blocks of one of ours, in order."""
        stem, found, kind = key.partition(".qkv.")
        return tuple(f"{stem}.{part}.{kind}" for part in _QKV) if found else (key,)


class _LayerNorm(nn.Module):
    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.dim))
        self.bias = nn.Parameter(torch.zeros(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        return layernorm(x, self.weight, self.bias, _NORM_EPS)

    def added(self, stream: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream with a block's update added, and its norm."""
        normed, total = layernorm_residual(update, stream, self.weight, self.bias, _NORM_EPS)
        return total, normed


class _Attention(nn.Module):
    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)


class _FeedForward(nn.Module):
    """Linear, exact GELU, linear, under the published indices 0 and 2."""

    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(config.dim, 4 * config.dim))
        self.add_module("2", nn.Linear(4 * config.dim, config.dim))

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.children()
        assert isinstance(up, nn.Linear)
        # The bias is left to the kernel that makes the GELU.
        out: Tensor = down(bias_gelu(F.linear(x, up.weight), up.bias))
        return out


class _Block(nn.Module):
    def __init__(self, config: TamingConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.ln1 = _LayerNorm(config)
        self.ln2 = _LayerNorm(config)
        self.attn = _Attention(config)
        self.mlp = _FeedForward(config)

    def forward(
        self, stream: Tensor, normed: Tensor, attend: Attend, next_norm: _LayerNorm
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and its norm, from before this block to before the next."""
        qkv = self.attn.qkv(normed).unflatten(-1, (3, self.attn.num_heads, -1))
        stream, normed = self.ln2.added(stream, self.attn.proj(attend(self.index, qkv)))
        return next_norm.added(stream, self.mlp(normed))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
