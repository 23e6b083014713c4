"""The policy in plain PyTorch over static caches: what static_cache_peer.py compiles.

Shapes: N images, R rows (2 N with guidance), P prefix positions, T image tokens, H heads, D head
size, S positions fed at once, E cache entries.
"""

import torch
from rollout_contenders import Case
from torch import Tensor, nn
from torch.nn import functional as F

from argrpo.models.llamagen import LlamaGen


class StaticDecoder(nn.Module):
    """The policy in plain PyTorch, over static caches.

    A module, because the compiler lets a recorded graph write to a module's buffers in place.
    """

    allowed: Tensor
    entries: Tensor
    rotary: Tensor

    def __init__(self, case: Case, policy: LlamaGen, num_entries: int, *, greedy: bool) -> None:
        super().__init__()
        shape = policy.shape
        num_rows = case.images * (2 if case.is_guided else 1)
        cache_size = num_rows, shape.num_heads, num_entries, shape.head_dim
        weights = dict(policy.named_parameters())
        self.layers = nn.ModuleList(
            _Layer(weights, f"layers.{i}.", cache_size, policy.config.norm_eps)
            for i in range(shape.num_layers)
        )
        self.embedding, self.norm = weights["tok_embeddings.weight"], weights["norm.weight"]
        self.head = weights["output.weight"]
        self._eps, self._scale = policy.config.norm_eps, case.guidance_scale
        self._is_guided, self._greedy = case.is_guided, greedy
        self._device, self._dtype = case.device, case.dtype
        self._first_entry = shape.prefix_len - 1
        self.register_buffer("rotary", policy.rotary)
        self.register_buffer("entries", torch.arange(num_entries, device=case.device))
        self.register_buffer("allowed", self.entries.new_empty(0, dtype=torch.bool))

    def open_caches(self) -> bool:
        """Take the memory; False if it is held already."""
        taken = [layer.open_cache(self._device, self._dtype) for layer in self.layers]
        return any(taken)

    def close_caches(self) -> None:
        for layer in self.layers:
            layer.close_cache()

    def randomise(self) -> None:
        for layer in self.layers:
            layer.randomise()

    def allow(self, mask: Tensor) -> None:
        """[R, P] bool, which prefix entries count; one row stands for all where all count."""
        rows = mask[:1] if bool(mask.all()) else mask
        wanted = F.pad(rows, (0, len(self.entries) - mask.shape[1]), value=True)[:, None, None]
        if wanted.shape != self.allowed.shape:
            self.allowed = wanted
        self.allowed.copy_(wanted)  # in place: a recorded graph knows its address

    def step(self, token_ids: Tensor, position: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Feed the last tokens and draw those at `position`, over the first `length` entries.

        Args:
            token_ids: [N] int64.
            position: [1] int64, 1 to T - 1.
            length: entries that are read.
        """
        x = F.embedding(token_ids, self.embedding)[:, None]
        if self._is_guided:
            x = torch.cat([x, x])
        at = position + self._first_entry
        allowed = self.allowed[..., :length] & (self.entries[:length] <= at)
        return self.sample(self(x, at, allowed, length)[:, -1])

    def forward(self, x: Tensor, at: Tensor, allowed: Tensor, length: int) -> Tensor:
        """[R, S, dim] embeddings at entries [S] -> [R, S, dim] final-norm hidden states."""
        rotary = self.rotary[at]
        for layer in self.layers:
            x = layer(x, rotary, at, allowed, length)
        return _normed(x, self.norm, self._eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, dim] hidden states -> [N, V] fp32 logits, guidance mixed."""
        if self._is_guided:
            cond, uncond = hidden.float().chunk(2)
            hidden = (uncond + self._scale * (cond - uncond)).to(hidden.dtype)
        return F.linear(hidden, self.head).float()

    def sample(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[N] int64 tokens and [N] fp32 log-probs: argmax(p / e), e exponential, draws from p."""
        logprobs = self.logits(hidden).log_softmax(dim=-1)
        if self._greedy:
            token_ids = logprobs.argmax(dim=-1)
        else:
            noise = torch.empty_like(logprobs).exponential_(1)
            token_ids = (logprobs.exp() / noise).argmax(dim=-1)
        return token_ids, logprobs.gather(1, token_ids[:, None])[:, 0]


class _Layer(nn.Module):
    """One layer and its cache."""

    keys: Tensor
    values: Tensor

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        stem: str,
        cache_size: tuple[int, int, int, int],
        eps: float,
    ) -> None:
        super().__init__()
        self.wqkv = weights[f"{stem}attention.wqkv.weight"]
        self.wo = weights[f"{stem}attention.wo.weight"]
        self.w13 = weights[f"{stem}feed_forward.w13"]
        self.w2 = weights[f"{stem}feed_forward.w2.weight"]
        self.attention_norm = weights[f"{stem}attention_norm.weight"]
        self.ffn_norm = weights[f"{stem}ffn_norm.weight"]
        self._cache_size, self._eps = cache_size, eps
        self.close_cache()

    def open_cache(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Take the memory; False if it is held already."""
        if self.keys.numel():
            return False
        # A buffer a layer: one of all layers would be copied whole by a compiler that cannot see
        # that its slices never meet.
        for name in ("keys", "values"):
            cache = torch.zeros(self._cache_size, device=device, dtype=dtype)
            self.register_buffer(name, cache, persistent=False)
        return True

    def close_cache(self) -> None:
        for name in ("keys", "values"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    def randomise(self) -> None:
        self.keys.normal_()
        self.values.normal_()

    def forward(
        self, x: Tensor, rotary: Tensor, at: Tensor, allowed: Tensor, length: int
    ) -> Tensor:
        qkv = F.linear(_normed(x, self.attention_norm, self._eps), self.wqkv)
        qkv = qkv.unflatten(-1, (3, self._cache_size[1], -1))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # each [R, H, S, D]
        self.keys.index_copy_(2, at, _rotated(keys, rotary))
        self.values.index_copy_(2, at, values)
        mixed = F.scaled_dot_product_attention(
            _rotated(queries, rotary),
            self.keys[:, :, :length],
            self.values[:, :, :length],
            attn_mask=allowed,
        )
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), self.wo)
        gate, up = F.linear(_normed(x, self.ffn_norm, self._eps), self.w13).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.w2)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def _rotated(x: Tensor, rotary: Tensor) -> Tensor:
    """[R, H, S, D] with interleaved pairs turned by [S, D / 2, 2] cosines and sines."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary.unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)
