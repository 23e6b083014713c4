"""The strong PyTorch loop: what torch.compile gives a good engineer who writes no kernel.

In the manner of gpt-fast: every layer has a static cache of keys and values, the position is a
tensor on the device, and one compiled call makes the whole step, from the embedding of the last
token to the next one and its log-prob. Tokens come from the exponential race, which does not wait
for the device as a multinomial does. Both branches of guidance are one batch, mixed before the head
as our engine does. Weights are the policy's own tensors.

Keys of a prefix are ordinary entries here: every step reads those of 120 text tokens. With one
stretch a step also reads the unused end of the cache, masked, as gpt-fast does; with several, a
call is compiled for each length and reads the stretches that are in use.

Shapes: N images, R rows (2 N with guidance), P prefix positions, T image tokens, H heads, D head
size, S positions fed at once, E cache entries (P + T - 1, rounded up).

Source: meta-pytorch/gpt-fast, generate.py.
"""

from collections.abc import Callable

import torch
from rollout_contenders import Case, random_tokens
from static_decoder import StaticDecoder
from torch import Tensor

from argrpo.engine.attention import prefix_allowed
from argrpo.models.llamagen import LlamaGen

_ENTRY_TILE = 8  # masks whose rows are not whole 16 bytes are copied before they are used
_WARM_CALLS = 3  # one compiles, one warms the memory, one records the graph

_Call = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class StaticCachePeer:
    """A contender of bench_rollout.py; gives log-probs beside the tokens, no entropies."""

    def __init__(
        self,
        case: Case,
        policy: LlamaGen,
        *,
        num_stretches: int = 1,
        compiled: bool = True,
        greedy: bool = False,
    ) -> None:
        """Compile the step on a CPU; on a GPU `prepare` does, whose memory the graph needs.

        Args:
            case: the work.
            policy: whose weights are read in place.
            num_stretches: lengths of cache that a call is compiled for.
            compiled: False leaves the step to eager PyTorch.
            greedy: the likeliest token instead of a draw.
        """
        self.name = "static_cache" if num_stretches == 1 else f"static_cache_{num_stretches}"
        self._case, self._policy, self._conditions = case, policy, case.conditions
        self._prefix_len = policy.shape.prefix_len
        num_entries = _rounded_up(self._prefix_len + case.num_tokens - 1)
        lengths = {
            min(_rounded_up(-(-num_entries * part // num_stretches)), num_entries)
            for part in range(1, num_stretches + 1)
        }
        self._lengths = sorted(lengths)
        self._decoder = StaticDecoder(case, policy, num_entries, greedy=greedy)
        self._call: _Call = self._decoder.step
        how = "eager PyTorch"
        if compiled and case.device.type == "cuda":
            # Each length is a call of its own, or the second would be compiled for any length.
            self._call = torch.compile(
                self._decoder.step, mode="reduce-overhead", fullgraph=True, dynamic=False
            )
            how = "torch.compile, reduce-overhead"
        elif compiled:
            how = self._compile_here()
        reads = "the whole static cache" if num_stretches == 1 else "the stretches in use"
        self.facts = {"how": f"{how}; reads {reads}; no entropy"}

    def _compile_here(self) -> str:
        """Compile for this CPU, and say how steps are made from now on."""
        self._call = torch.compile(self._decoder.step, fullgraph=True, dynamic=False)
        try:
            self.prepare()
            self._decoder.close_caches()
        except RuntimeError as error:  # no C++ compiler, for one
            self._call = self._decoder.step
            print(f"{self.name} runs without torch.compile: {str(error).partition(chr(10))[0]}")
            return "eager PyTorch"
        return "torch.compile"

    def prepare(self) -> None:
        """Random keys and values at every entry; steps of every length are warm."""
        self._open()
        self._decoder.randomise()

    @torch.no_grad()
    def step(self, position: int) -> object:
        self._position.fill_(position)
        return self._advance(self._length_at(position))

    def finish(self) -> None:
        """Its caches stay: the recorded graphs know their addresses."""

    def rollout(self) -> Tensor:
        return self.draw()[0]

    @torch.no_grad()
    def draw(self) -> tuple[Tensor, Tensor]:
        """[N, T] int64 tokens and [N, T] fp32 log-probs."""
        case = self._case
        self._open()
        first, logprob = self._decoder.sample(self._prefill())
        drawn = first.new_empty(case.num_tokens, case.images)
        logprobs = logprob.new_empty(case.num_tokens, case.images)
        drawn[0], logprobs[0] = first, logprob
        self._token_ids.copy_(first)
        self._position.fill_(1)
        for position in range(1, case.num_tokens):
            drawn[position], logprobs[position] = self._advance(self._length_at(position))
            self._token_ids.copy_(drawn[position])
            self._position.add_(1)
        return drawn.T, logprobs.T

    @torch.no_grad()
    def first_logits(self) -> Tensor:
        """[N, V] fp32 logits of token 0, guidance mixed, before the draw."""
        self._decoder.open_caches()
        logits = self._decoder.logits(self._prefill())
        self._decoder.close_caches()  # `prepare` is where its memory counts
        return logits

    def _open(self) -> None:
        """Take the memory of a draw and warm the steps; once."""
        case = self._case
        if not self._decoder.open_caches():
            return
        _embeddings, mask = self._prefixes()
        self._decoder.allow(mask)
        self._token_ids = random_tokens(case, case.images)
        self._position = torch.ones(1, dtype=torch.int64, device=case.device)
        for length in self._lengths:
            for _ in range(_WARM_CALLS if case.device.type == "cuda" else 1):
                self._advance(length)

    @torch.no_grad()
    def _advance(self, length: int) -> tuple[Tensor, Tensor]:
        return self._call(self._token_ids, self._position, length)

    def _length_at(self, position: int) -> int:
        entries = self._prefix_len + position
        return next(length for length in self._lengths if length >= entries)

    def _prefill(self) -> Tensor:
        """Keys and values of the prefix -> [R, dim] hidden states of its last position."""
        embeddings, mask = self._prefixes()
        self._decoder.allow(mask)
        num_positions = mask.shape[1]
        allowed = prefix_allowed(mask, num_positions)
        at = torch.arange(num_positions, device=mask.device)
        return self._decoder(embeddings, at, allowed, num_positions)[:, -1]

    @torch.no_grad()
    def _prefixes(self) -> tuple[Tensor, Tensor]:
        """[R, P, dim] embeddings and [R, P] bool mask, conditional rows first."""
        branches = [self._conditions]
        if self._case.is_guided:
            branches.append(self._policy.null_conditions(self._conditions))
        prefixes = [self._policy.embed_conditions(branch) for branch in branches]
        embeddings = torch.cat([prefix.embeddings for prefix in prefixes])
        return embeddings, torch.cat([prefix.mask for prefix in prefixes])


def _rounded_up(num_entries: int) -> int:
    return -(-num_entries // _ENTRY_TILE) * _ENTRY_TILE
