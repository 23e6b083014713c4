"""The peers of bench_rollout.py by name, and a look at each before it is timed."""

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from hf_static_peer import HfStaticPeer
from llamagen_peer import LlamaGenPeer
from llamagen_variants import LlamaGenCompiled, LlamaGenGraph
from rollout_contenders import Case, Contender, PeerMissingError
from static_cache_peer import StaticCachePeer
from torch import Tensor
from turns import PeakMemory

from argrpo.models.llamagen import LlamaGen

# How far a peer's logits may lie from ours, relative to their size: the rounding of a forward pass,
# and in bf16 also that a peer may mix rounded logits where we mix hidden states.
_SAME_LOGITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


_Made = TypeVar("_Made")


class Peer(Contender, Protocol):
    """A contender that is not ours."""

    facts: dict[str, str]
    """What its rows say beside the figures: `how` it makes a step, and what else differs."""

    def first_logits(self) -> Tensor | None:
        """[N, V] fp32 logits of token 0, guidance mixed; None for one with weights of its own."""
        ...


PEERS: dict[str, Callable[[Case, LlamaGen, Path | None], Peer]] = {
    "static_cache": lambda case, policy, _: StaticCachePeer(case, policy),
    "static_cache_4": lambda case, policy, _: StaticCachePeer(case, policy, num_stretches=4),
    "llamagen": LlamaGenPeer,
    "llamagen_compiled": LlamaGenCompiled,
    "llamagen_graph": LlamaGenGraph,
    "hf_static": lambda case, _policy, _: HfStaticPeer(case),
    "vllm": lambda _case, _policy, _: _no_vllm(),
}


def _no_vllm() -> Peer:
    """
    Raises:
        PeerMissingError: always. It mixes no two sequences before a token is drawn.
    """
    raise PeerMissingError(
        "vllm: mixes no branches of guidance by itself; LlamaGen's fork of vLLM 0.4.1 does, and "
        "runs on no torch that argrpo supports; its published figures are cited in bench/README.md"
    )


def peers_of(case: Case, policy: LlamaGen, names: Sequence[str], path: Path | None) -> list[Peer]:
    """The peers that can be built; one that cannot is a printed line.

    Args:
        case: the work.
        policy: whose weights they get.
        names: keys of `PEERS`.
        path: a checkout of LlamaGen's repository, for those that are in it.

    Raises:
        RuntimeError: a peer has our weights and other logits.
    """
    peers = []
    for name in names:
        peer = or_a_line(name, partial(PEERS[name], case, policy, path))
        if peer is not None:
            _check_logits(peer, case, policy)
            peers.append(peer)
    return peers


def measured_peaks(contenders: Sequence[Contender], case: Case) -> dict[str, int]:
    """Bytes of a draw beside the weights, caches and the last step, by contender.

    The first step of each: a peer that cannot make one is a printed line, and not among them.
    """
    peaks = {}
    for contender in contenders:
        taken = or_a_line(contender.name, partial(peak_bytes, contender, case))
        if taken is not None:
            peaks[contender.name] = taken
    return peaks


def peak_bytes(contender: Contender, case: Case) -> int:
    """Memory of a draw beside the weights: caches, and the last step."""
    memory = PeakMemory(case.device)
    contender.prepare()
    contender.step(case.num_tokens - 1)
    taken = memory.taken()
    contender.finish()
    return taken


def forget_compiled(device: torch.device) -> None:
    """Let go of the former case's compiled steps and caches.

    A function is compiled for so many cases only, and a recorded graph keeps its memory.
    """
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _check_logits(peer: Peer, case: Case, policy: LlamaGen) -> None:
    found = peer.first_logits()
    if found is None:
        return
    token_ids = torch.zeros(case.images, 2, dtype=torch.int64, device=case.device)
    expected = policy.logits(case.conditions, token_ids, case.guidance_scale)[:, 0]
    apart = float((found - expected).norm() / expected.norm())
    if not apart <= _SAME_LOGITS[case.dtype]:
        raise RuntimeError(
            f"{peer.name}: expected the logits of our policy within {_SAME_LOGITS[case.dtype]:g}, "
            f"got a relative difference of {apart:.2g}"
        )


def or_a_line(name: str, make: Callable[[], _Made]) -> _Made | None:
    """What is made, or nothing and a printed line that says why."""
    try:
        return make()
    except PeerMissingError as error:
        print(f"without the peer: {error}")
    except Exception as error:  # code of others, which may fail in any way
        print(
            f"without the peer: {name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        )
    return None
