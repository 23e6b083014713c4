"""LlamaGen's sampler with its launches taken away: compiled, and captured. Both need a GPU."""

from pathlib import Path
from unittest.mock import patch

import torch
from llamagen_peer import LlamaGenPeer
from rollout_contenders import Case, PeerMissingError
from timing import captured
from torch import Tensor

from argrpo.models.llamagen import LlamaGen


class LlamaGenCompiled(LlamaGenPeer):
    """Its model as its sample script compiles it; guidance and sampling stay eager."""

    name = "llamagen_compiled"

    def __init__(self, case: Case, policy: LlamaGen, path: Path | None) -> None:
        """
        Raises:
            PeerMissingError: no GPU, or no checkout.
        """
        _require_gpu(case, self.name)
        super().__init__(case, policy, path)
        self._run = torch.compile(self._model, mode="reduce-overhead", fullgraph=True)
        self.facts = {
            "how": "model under torch.compile, reduce-overhead; sampling eager; no log-prob; a "
            "rollout makes new caches, and so new graphs"
        }


class LlamaGenGraph(LlamaGenPeer):
    """Its `decode_one_token` as a CUDA graph, with whichever attention PyTorch picks.

    Its multinomial may wait for the device, which no graph can, so the captured step draws by the
    exponential race from the same probabilities.
    """

    name = "llamagen_graph"

    def __init__(self, case: Case, policy: LlamaGen, path: Path | None) -> None:
        """
        Raises:
            PeerMissingError: no GPU, or no checkout.
        """
        _require_gpu(case, self.name)
        super().__init__(case, policy, path)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.facts = {
            "how": "decode_one_token as a CUDA graph; exponential race for its multinomial; any "
            "attention of PyTorch's; no log-prob"
        }

    def prepare(self) -> None:
        self._captured()
        self._randomise()

    def step(self, position: int) -> object:
        self._at.fill_(position)
        self._captured().replay()
        return self._tokens

    @torch.no_grad()
    def rollout(self) -> Tensor:
        """[N, T] int64 tokens."""
        graph, case = self._captured(), self._case
        drawn = self._tokens.new_empty(case.num_tokens, case.images, 1)
        at = torch.arange(1, device=case.device)
        drawn[0] = self._sampler.prefill(
            self._model, self._branches(case.labels), at, case.guidance_scale, **self._settings
        )
        self._tokens.copy_(drawn[0])
        self._at.fill_(1)
        for position in range(1, case.num_tokens):
            graph.replay()
            drawn[position] = self._tokens
        return drawn[..., 0].T

    @torch.no_grad()
    def _captured(self) -> torch.cuda.CUDAGraph:
        """The graph of a turn, which knows the addresses of the caches; captured once."""
        if self._graph is None:
            super().prepare()
            self._at.fill_(1)
            with patch.object(self._sampler, "sample", _raced):
                self._graph = captured([self._turn])
        return self._graph

    def _turn(self) -> None:
        """One turn of its loop, from and to the same addresses."""
        token, _probs = self._sampler.decode_one_token(
            *(self._model, self._tokens, self._at, self._case.guidance_scale, True),
            **self._settings,
        )
        self._tokens.copy_(token)
        self._at += 1


def _raced(logits: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """In place of its `sample`: [R, 1, V] logits -> [R, 1] tokens and [R, V] probabilities."""
    assert (temperature, top_k, top_p) == (1.0, 0, 1.0)
    probs = logits[:, -1].softmax(dim=-1)
    noise = torch.empty_like(probs).exponential_(1)
    return (probs / noise).argmax(dim=-1, keepdim=True), probs


def _require_gpu(case: Case, name: str) -> None:
    if case.device.type != "cuda":
        raise PeerMissingError(f"{name}: expected a GPU, got {case.device}")
