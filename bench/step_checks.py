"""Before a training step is timed: does a contender do our work?

On the first two images: its sampler's mixed logits at the tokens that it drew, its log-probs and
the gradients of its loss at given tokens, advantages and reference, its pixels and its scores, each
against ours. Nothing is timed whose result is another.
"""

import torch
from plain_path import PlainStep, logprobs_of
from rollout_contenders import VOCAB_SIZE
from step_case import Judges, StepCase
from step_ours import our_gradients
from torch import Tensor

from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.llamagen import LlamaGen
from argrpo.models.vq import VQTokenizer
from argrpo.token_scores import TokensToScore, scored

_IMAGES = 2
# Distances relative to our result, the rounding of other products in other orders; in bf16 a peer
# also rounds logits before it mixes them, and gradients are sums of rounded ones.
_ALLOWED = {
    torch.float32: {"logits": 1e-4, "logprobs": 1e-4, "gradients": 1e-3, "pixels": 1e-3,
                    "scores": 1e-3},
    torch.bfloat16: {"logits": 0.05, "logprobs": 0.05, "gradients": 0.15, "pixels": 0.05,
                     "scores": 0.1},
}  # fmt: skip


def differences(
    case: StepCase,
    policy: LlamaGen,
    tokenizer: VQTokenizer,
    judges: Judges,
    peer: PlainStep,
) -> dict[str, float]:
    """How far a peer's results lie from ours, by name, relative.

    Raises:
        RuntimeError: further than rounding takes them.
    """
    labels, draw = case.labels[:_IMAGES], case.draw
    made = torch.Generator().manual_seed(4)
    token_ids = torch.randint(VOCAB_SIZE, (_IMAGES, draw.num_tokens), generator=made)
    token_ids = token_ids.to(draw.device)
    tokens = TokensToScore(labels, token_ids, SamplingParams(), None)
    ours = scored(policy, tokens, _IMAGES).logprobs
    noise = torch.randn(token_ids.shape, generator=made).to(draw.device)
    # A reference some way off, or the KL would have no gradient to compare.
    constants = torch.linspace(-1, 1, _IMAGES, device=draw.device), ours + 0.5 * noise
    with torch.no_grad():
        found = logprobs_of(peer.model.logits(labels, token_ids), token_ids)
        drawn, logits = peer.model.draw(labels)
        expected = policy.logits(labels, drawn, draw.guidance_scale)
        images = tokenizer.decode(token_ids)
        apart = {
            "logits": _distance(logits, expected),
            "logprobs": _distance(found, ours),
            "pixels": _distance(peer.pixels(token_ids), images),
            "scores": _distance(judges.one_by_one(images, labels), judges.together(images, labels)),
        }
    _refuse(peer.name, apart, _ALLOWED[draw.dtype])
    gradients = peer.gradients(labels, token_ids, *constants)
    expected_gradients = our_gradients(case, policy, tokens, *constants)
    apart["gradients"] = _gradient_distance(gradients, expected_gradients)
    _refuse(peer.name, apart, _ALLOWED[draw.dtype])
    return {f"{name}_difference": float(f"{value:.2g}") for name, value in apart.items()}


def _refuse(peer: str, apart: dict[str, float], allowed: dict[str, float]) -> None:
    for name, value in apart.items():
        if not value <= allowed[name]:
            raise RuntimeError(
                f"{peer}: expected our {name} within {allowed[name]:g}, got a relative difference "
                f"of {value:.2g}"
            )


def _gradient_distance(found: dict[str, Tensor], ours: dict[str, Tensor]) -> float:
    """The largest of all weights; w1 and w3 are one of ours.

    Raises:
        RuntimeError: a weight has a gradient on one side alone.
    """
    expected = {}
    for name, gradient in ours.items():
        if name.endswith("feed_forward.w13"):
            stem = name.removesuffix("w13")
            expected[f"{stem}w1.weight"], expected[f"{stem}w3.weight"] = gradient.chunk(2)
        else:
            expected[name] = gradient
    if set(found) != set(expected):
        odd = sorted(set(found) ^ set(expected))
        raise RuntimeError(f"gradients: expected those of the same weights, got {odd[0]} alone")
    return max(_distance(found[name], gradient) for name, gradient in expected.items())


def _distance(found: Tensor, expected: Tensor) -> float:
    wide = expected.float()
    return float((found.float() - wide).norm() / wide.norm())
