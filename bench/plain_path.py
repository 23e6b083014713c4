"""AR-GRPO's training step by its own arithmetic, in plain PyTorch.

    rollout    an eager loop over a static cache, both branches as one batch, guidance on logits in
               fp32, multinomial; the mixed logits of all tokens are kept
    decode     all images at once
    reward     one image at a time
    logprob    the reference over all images, a dense mask [N, 1, S, S], logits [N, S, V] in fp32
    update     the same with a gradient, TRL's loss, the entropy of the kept logits, AdamW

Where the published code does more than its arithmetic asks for, this leaves it out, so it is a
bound of that code from below: copies of the whole cache at every step, images sent through PIL,
texts embedded anew for each image, token ids read back one by one. Weights, gradients and moments
have one dtype, as in its text run; it knows no fp32 masters.

Shapes: N images, R rows (2 N with guidance), T image tokens, S = T + 1 positions, V codebook.

Source: arXiv:2508.06924; Kwai-Klear/AR-GRPO at 65947ad (autoregressive/models/generate.py,
autoregressive/modeling.py, modified_grpo_trainer.py, which is TRL 0.19's trainer).
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from llamagen_peer import published_weights
from rollout_contenders import NUM_CLASSES
from step_case import BETA, Judges, StepCase
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from argrpo.models.llamagen import LlamaGen
from argrpo.models.vq import VQTokenizer

_EPSILON, _LEARNING_RATE, _MAX_NORM = 0.2, 1e-5, 1.0


class TrainedModel(Protocol):
    """What a step asks of a policy; its weights may require gradients."""

    def draw(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[N] classes -> [N, T] int64 tokens and [N, T, V] fp32 mixed logits."""
        ...

    def logits(self, labels: Tensor, token_ids: Tensor) -> Tensor:
        """[N, T, V] fp32, conditional. Differentiable."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """By their published names."""
        ...


class PlainStep:
    """A step over any model of the published shape."""

    def __init__(
        self,
        name: str,
        case: StepCase,
        models: tuple[TrainedModel, TrainedModel],
        tokenizer: VQTokenizer,
        judges: Judges,
    ) -> None:
        """`models` are the policy and its frozen reference."""
        self.name = name
        self._case, self._tokenizer, self._judges = case, tokenizer, judges
        self.model, self._reference = models
        self._weights = [weight for _, weight in self.model.named_parameters()]
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=_LEARNING_RATE, weight_decay=0.0, fused=True
        )
        self._labels = case.labels
        self._clock = case.make_clock()
        self.facts = {"how": "plain PyTorch, eager: " + _HOW}

    def pixels(self, token_ids: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1], all at once."""
        return self._tokenizer.decode(token_ids, decode_batch=len(token_ids))

    def run(self, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        case, clock, labels = self._case, self._clock, self._labels
        clock.start_step()
        with clock.phase("rollout"):
            token_ids, drawn = self.model.draw(labels)
        with clock.phase("decode"):
            images = self.pixels(token_ids)
        with clock.phase("reward"):
            scores = self._judges.one_by_one(images, labels)
            advantages = case.advantages(scores).values.flatten()
        with clock.phase("logprob"), torch.no_grad():
            ref_logprobs = logprobs_of(self._reference.logits(labels, token_ids), token_ids)
        with clock.phase("update"):
            self._update(token_ids, advantages, ref_logprobs, drawn)
        return clock.finish_step(len(token_ids), token_ids.numel())

    def gradients(
        self, labels: Tensor, token_ids: Tensor, advantages: Tensor, ref_logprobs: Tensor
    ) -> dict[str, Tensor]:
        """Those of the loss, by published name; none are left behind."""
        self._loss(labels, token_ids, advantages, ref_logprobs).backward()
        found = {name: weight.grad for name, weight in self.model.named_parameters()}
        self._optimizer.zero_grad(set_to_none=True)
        return {name: grad for name, grad in found.items() if grad is not None}

    def _update(
        self, token_ids: Tensor, advantages: Tensor, ref_logprobs: Tensor, drawn: Tensor
    ) -> None:
        size = self._case.micro_batch
        for rows in torch.arange(len(token_ids), device=token_ids.device).split(size):
            _mean_entropy(drawn[rows])
            loss = self._loss(
                self._labels[rows], token_ids[rows], advantages[rows], ref_logprobs[rows]
            )
            (loss * len(rows) / len(token_ids)).backward()
        torch.nn.utils.clip_grad_norm_(self._weights, _MAX_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _loss(
        self, labels: Tensor, token_ids: Tensor, advantages: Tensor, ref_logprobs: Tensor
    ) -> Tensor:
        logprobs = logprobs_of(self.model.logits(labels, token_ids), token_ids)
        ratio = (logprobs - logprobs.detach()).exp()
        clipped = ratio.clamp(1 - _EPSILON, 1 + _EPSILON)
        surrogate = torch.min(ratio * advantages[:, None], clipped * advantages[:, None])
        apart = ref_logprobs - logprobs
        kl = apart.exp() - apart - 1
        return (BETA * kl - surrogate).mean()


_HOW = (
    "static cache, guidance on logits, math attention; judges one image at a time; dense mask; "
    "[N, T, V] logits in fp32; moments in the dtype of the weights"
)


def logprobs_of(logits: Tensor, token_ids: Tensor) -> Tensor:
    """[N, T, V] fp32 and [N, T] -> [N, T]: TRL's way, normalised an image at a time."""
    logits = logits / 1.0  # the temperature: a copy, as there
    chosen = logits.gather(-1, token_ids[..., None]).squeeze(-1)
    return chosen - torch.stack([image.logsumexp(dim=-1) for image in logits])


def _mean_entropy(logits: Tensor) -> float:
    """Nats, of the distribution that drew; logged, not optimised."""
    probs = logits.softmax(dim=-1)
    return float((logits.logsumexp(dim=-1) - (probs * logits).sum(dim=-1)).mean())


class PlainLlamaGen:
    """The published model, operation by operation, on weights of its own."""

    def __init__(self, case: StepCase, policy: LlamaGen, *, trained: bool) -> None:
        self._weights = {
            name: weight.detach().clone().requires_grad_(trained)
            for name, weight in published_weights(policy).items()
        }
        self._rotary = policy.rotary
        self._config, self._scale = policy.config, case.draw.guidance_scale

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._weights.items()

    def logits(self, labels: Tensor, token_ids: Tensor) -> Tensor:
        prefix = self._embedded("cls_embedding.embedding_table", labels[:, None])
        x = torch.cat([prefix, self._embedded("tok_embeddings", token_ids)], dim=1)
        size = x.shape[1]
        ones = torch.ones(len(x), size, size, device=x.device)
        mask = ones.tril()[:, None].bool()
        for layer in range(self._config.num_layers):
            qkv = self._rotated(layer, x, self._rotary)
            x = self._after(layer, x, F.scaled_dot_product_attention(*qkv, attn_mask=mask))
        return self._head(x)[:, :-1]

    @torch.no_grad()
    def draw(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        guided = self._scale > 1
        rows = torch.cat([labels, torch.full_like(labels, NUM_CLASSES)]) if guided else labels
        caches, mask = self._empty_caches(len(rows), rows.device)
        x = self._embedded("cls_embedding.embedding_table", rows[:, None])
        drawn: list[Tensor] = []
        kept: list[Tensor] = []
        for position in range(self._config.num_image_tokens):
            kept.append(self._mixed(self._advance(x, position, caches, mask)))
            drawn.append(torch.multinomial(kept[-1].softmax(dim=-1), 1))
            fed = torch.cat([drawn[-1], drawn[-1]]) if guided else drawn[-1]
            x = self._embedded("tok_embeddings", fed)
        return torch.cat(drawn, dim=1), torch.stack(kept, dim=1)

    def _mixed(self, logits: Tensor) -> Tensor:
        if self._scale <= 1:
            return logits
        cond, uncond = logits.chunk(2)
        return uncond + (cond - uncond) * self._scale

    def _empty_caches(self, rows: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
        config = self._config
        size = -(-(1 + config.num_image_tokens) // 8) * 8
        shape = (2, rows, config.num_heads, size, config.head_dim)
        dtype = self._weights["output.weight"].dtype
        caches = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        return caches, torch.ones(size, size, device=device).tril().bool().repeat(rows, 1, 1)

    def _advance(self, x: Tensor, position: int, caches: list[Tensor], mask: Tensor) -> Tensor:
        """[R, 1, D] at a position -> [R, V] fp32 logits."""
        at = torch.tensor([position], device=x.device)
        with sdpa_kernel(SDPBackend.MATH):
            for layer, (keys, values) in enumerate(caches):
                query, key, value = self._rotated(layer, x, self._rotary[at])
                keys[:, :, at], values[:, :, at] = key, value
                seen = mask[:, None, at]
                out = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
                x = self._after(layer, x, out)
        return self._head(x)[:, -1]

    def _rotated(self, layer: int, x: Tensor, rotary: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [R, H, S, head_dim] of a layer."""
        normed = self._normed(f"layers.{layer}.attention_norm", x)
        qkv = self._linear(f"layers.{layer}.attention.wqkv", normed)
        q, k, v = qkv.unflatten(-1, (3, self._config.num_heads, -1)).unbind(2)
        q, k = (_turned(side, rotary[:, None]) for side in (q, k))
        return tuple(side.transpose(1, 2) for side in (q, k, v))

    def _after(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer."""
        stem = f"layers.{layer}"
        x = x + self._linear(f"{stem}.attention.wo", attended.transpose(1, 2).flatten(2))
        normed = self._normed(f"{stem}.ffn_norm", x)
        w1, w3 = (self._linear(f"{stem}.feed_forward.{name}", normed) for name in ("w1", "w3"))
        return x + self._linear(f"{stem}.feed_forward.w2", F.silu(w1) * w3)

    def _head(self, x: Tensor) -> Tensor:
        return self._linear("output", self._normed("norm", x)).float()

    def _embedded(self, name: str, indices: Tensor) -> Tensor:
        return F.embedding(indices, self._weights[f"{name}.weight"])

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"])

    def _normed(self, name: str, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(
            wide.square().mean(dim=-1, keepdim=True) + self._config.norm_eps
        )
        return scaled.to(x.dtype) * self._weights[f"{name}.weight"]


def _turned(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary embedding of [R, S, H, head_dim] by [S, 1, head_dim / 2, 2], in fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary.unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)
