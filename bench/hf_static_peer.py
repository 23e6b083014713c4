"""transformers' Llama with its static cache as a contender: what its users get at this size.

Width, layers, heads, feed-forward width and codebook are the policy's; the rotary embedding turns
with one position instead of a row and a column, so the weights would draw other tokens and are its
own. Speed only.
"""

from collections.abc import Callable
from typing import Any

import torch
from rollout_contenders import MODELS, VOCAB_SIZE, Case, PeerMissingError, random_tokens
from torch import Tensor


class HfStaticPeer:
    """`LlamaForCausalLM` over a `StaticCache`, both branches of guidance as one batch.

    On a GPU its forward pass is compiled as its own `generate` compiles it for this cache; mixing,
    softmax and multinomial follow as they are.
    """

    name = "hf_static"

    def __init__(self, case: Case) -> None:
        """
        Raises:
            PeerMissingError: transformers is not installed.
        """
        try:
            from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
        except ImportError as error:
            raise PeerMissingError(f"{self.name}: transformers is missing: {error}") from error
        sizes = MODELS[case.model]
        self._case = case
        self._prefix_len = case.text_tokens or 1
        self._num_entries = self._prefix_len + case.num_tokens - 1
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=sizes.dim,
            intermediate_size=sizes.ffn_dim,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.num_heads,
            max_position_embeddings=self._num_entries,
            attn_implementation="sdpa",
        )
        with case.device:
            model = LlamaForCausalLM(config)
        self._model = model.to(dtype=case.dtype).eval().requires_grad_(False)
        self._forward: Callable[..., Any] = self._model
        how = "eager forward pass"
        if case.device.type == "cuda":
            self._forward = torch.compile(self._model, mode="reduce-overhead")
            how = "forward pass under torch.compile, reduce-overhead"
        self._cache = StaticCache(config=config, max_cache_len=self._num_entries)
        self._entries = 0
        self.facts = {
            "how": f"{how}; reads the whole static cache; multinomial; no log-prob",
            "weights": "random, its own",
        }

    def prepare(self) -> None:
        """Take the cache; a step is one at any position, because all of it is read."""
        case = self._case
        if not self._entries:
            self._prefill()
        for layer in self._cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self._tokens = random_tokens(case, case.images)[:, None]

    def step(self, position: int) -> object:
        """Feed the last tokens at the next free entry, or from the prefix on when none is left."""
        if self._entries == self._num_entries:
            self._rewind()
        return self._advance(self._tokens)

    def finish(self) -> None:
        """Its cache stays: a recorded graph knows the addresses."""

    def rollout(self) -> Tensor:
        """[N, T] int64 tokens."""
        drawn = [self._prefill()]
        for _ in range(1, self._case.num_tokens):
            drawn.append(self._advance(drawn[-1]))
        return torch.cat(drawn, dim=1)

    def first_logits(self) -> None:
        """Nothing to compare: its weights are its own."""

    @torch.no_grad()
    def _prefill(self) -> Tensor:
        """Token 0, [N, 1], from a prefix of random embeddings."""
        self._cache.reset()
        rows, width = self._num_rows, self._model.config.hidden_size
        size = rows, self._prefix_len, width
        prefix = torch.randn(size, device=self._case.device, dtype=self._case.dtype)
        # Not through the compiled call, as in its `generate`: the prefix has another length.
        output = self._model(inputs_embeds=prefix, past_key_values=self._cache, logits_to_keep=1)
        self._entries = self._prefix_len
        return self._sampled(output.logits)

    @torch.no_grad()
    def _advance(self, token_ids: Tensor) -> Tensor:
        fed = torch.cat([token_ids, token_ids]) if self._case.is_guided else token_ids
        output = self._forward(input_ids=fed, past_key_values=self._cache)
        self._entries += 1
        return self._sampled(output.logits)

    def _rewind(self) -> None:
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._prefix_len)
        self._entries = self._prefix_len

    def _sampled(self, logits: Tensor) -> Tensor:
        """[R, 1, V] logits -> [N, 1] tokens."""
        mixed = logits[:, -1].float()
        if self._case.is_guided:
            cond, uncond = mixed.chunk(2)
            mixed = uncond + self._case.guidance_scale * (cond - uncond)
        return torch.multinomial(mixed.softmax(dim=-1), 1)

    @property
    def _num_rows(self) -> int:
        return self._case.images * (2 if self._case.is_guided else 1)
