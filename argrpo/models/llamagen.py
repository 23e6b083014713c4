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

from argrpo.engine.attention import Attend, CausalAttend, prefix_allowed
from argrpo.engine.conditions import Conditions, TextFeatures, moved_to
from argrpo.engine.policy import PolicyShape, Prefix
from argrpo.engine.sampling_params import SamplingParams
from argrpo.kernels.guided_sampling import filter_mask, head_logits, mix_hidden, pack_support
from argrpo.kernels.rmsnorm import rmsnorm, rmsnorm_residual
from argrpo.kernels.swiglu import swiglu
from argrpo.kernels.token_logprobs import token_logprobs
from argrpo.models.conditioning import CaptionEmbedding, LabelEmbedding

_INIT_STD = 0.02
_SUPPORT_CHUNK = 512  # rows of logits held at once while a support is rebuilt


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
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 4:
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

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def grid_size(self) -> int:
        return self.image_size // self.downsample

    @property
    def num_image_tokens(self) -> int:
        return self.grid_size**2


class LlamaGen(nn.Module):
    """A LlamaGen policy. See `argrpo.load_policy` for weights from disk."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self._rotary = rotary_table(config)
        self.cls_embedding = (
            LabelEmbedding(config.num_classes, config.dim)
            if config.model_type == "c2i"
            else CaptionEmbedding(config.prefix_len, config.caption_dim, config.dim)
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
            self._rotary = rotary_table(self.config).to(self.head_weight.device)
        return self._rotary

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
        """[N, S, D] embeddings -> [N, S, D] final-norm hidden states."""
        # Each norm also makes the residual add before it: one launch for both.
        normed = self.layers[0].attention_norm(x)
        norms = [*(layer.attention_norm for layer in self.layers[1:]), self.norm]
        for layer, next_norm in zip(self.layers, norms, strict=True):
            x, normed = layer(x, normed, attend, next_norm)
        return normed

    def hidden(self, conditions: Conditions, token_ids: Tensor) -> Tensor:
        """Final-norm hidden states of given images; row t predicts token t. Differentiable.

        Args:
            conditions: labels [N] int64, or `TextFeatures` with N rows.
            token_ids: [N, T'] int64, T' <= T; the last column is not fed.

        Returns:
            [N, T', D] in the dtype of the weights.
        """
        prefix = self.embed_conditions(conditions)
        x = torch.cat([prefix.embeddings, self.tok_embeddings(token_ids[:, :-1])], dim=1)
        allowed = (
            None if self.config.model_type == "c2i" else prefix_allowed(prefix.mask, x.shape[1])
        )
        attend = CausalAttend(self.rotary[: x.shape[1]], allowed)
        return self.trunk(x, attend)[:, self.config.prefix_len - 1 :].contiguous()

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
        hidden = self._drawn_hidden(conditions, token_ids, params)
        return head_logits(hidden.flatten(0, 1), self.head_weight).unflatten(0, token_ids.shape)

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
        hidden = self._drawn_hidden(conditions, token_ids, params).flatten(0, 1)
        chosen = token_ids.flatten()
        if params.temperature == 0:
            return self._greedy_logprobs(hidden, chosen).view(token_ids.shape)
        kept = None if support is None else support.flatten(0, 1)
        if kept is None and params.is_filtered:
            kept = self._support(hidden, params)
        scores = token_logprobs(hidden, self.head_weight, chosen, params.temperature, kept)
        return scores.logprobs.view(token_ids.shape)

    def _drawn_hidden(
        self, conditions: Conditions, token_ids: Tensor, params: SamplingParams
    ) -> Tensor:
        """[N, T, D] hidden states that the head turns into the (mixed) logits of a draw."""
        conditions = moved_to(conditions, token_ids.device)
        self.check_conditions(conditions)
        self._check_token_ids(conditions, token_ids)
        cond = self.hidden(conditions, token_ids)
        num_guided = params.num_guided(token_ids.shape[1])
        if num_guided == 0:
            return cond
        uncond = self.hidden(self.null_conditions(conditions), token_ids[:, :num_guided])
        guided = mix_hidden(cond[:, :num_guided], uncond, params.guidance_scale)
        return torch.cat([guided, cond[:, num_guided:]], dim=1)

    def _check_token_ids(self, conditions: Conditions, token_ids: Tensor) -> None:
        rows = len(conditions.rows) if isinstance(conditions, TextFeatures) else len(conditions)
        limit = self.config.num_image_tokens
        fits = token_ids.dim() == 2 and len(token_ids) == rows
        if not fits or not 1 <= token_ids.shape[1] <= limit or token_ids.dtype != torch.int64:
            raise ValueError(
                f"token_ids: expected int64 of shape [{rows}, 1..{limit}], "
                f"got {token_ids.dtype} {list(token_ids.shape)}"
            )

    @torch.no_grad()
    def _greedy_logprobs(self, hidden: Tensor, chosen: Tensor) -> Tensor:
        best = torch.cat(
            [head_logits(h, self.head_weight).argmax(dim=1) for h in hidden.split(_SUPPORT_CHUNK)]
        )
        return torch.zeros(len(chosen), device=chosen.device).masked_fill(
            best != chosen, -torch.inf
        )

    @torch.no_grad()
    def _support(self, hidden: Tensor, params: SamplingParams) -> Tensor:
        """[N * T, ceil(V / 8)] uint8 kept sets, found from the logits a chunk at a time."""
        parts = []
        for chunk in hidden.split(_SUPPORT_CHUNK):
            logits = head_logits(chunk, self.head_weight)
            kept = filter_mask(logits, params.top_k, params.top_p, params.temperature)
            parts.append(pack_support(kept))
        return torch.cat(parts)


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


def rotary_table(config: LlamaGenConfig) -> Tensor:
    """[P + T, head_dim / 2, 2] fp32 cosines and sines: zeros for the prefix, then the grid.

    The first half of a head's pairs turns with the row, the second half with the column.
    """
    num_frequencies = config.head_dim // 4
    # On the CPU whatever the default device is, so that every device has the same bits.
    exponents = torch.arange(num_frequencies, dtype=torch.float32, device="cpu") / num_frequencies
    places = torch.arange(config.grid_size, dtype=torch.float32, device="cpu")
    angles = torch.outer(places, 1.0 / config.rope_base**exponents)
    rows = angles[:, None, :].expand(-1, config.grid_size, -1)
    columns = angles[None, :, :].expand(config.grid_size, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    table = torch.stack([grid.cos(), grid.sin()], dim=-1)
    return torch.cat([table.new_zeros(config.prefix_len, *table.shape[1:]), table])


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_INIT_STD)
