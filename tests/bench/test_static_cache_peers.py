"""Peers of bench_rollout.py that hold their caches in place: what they draw, read and capture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams

# fp32 products of other shapes, over logits of size 1.
ROUNDING = 1e-5


def lively(policy: Any) -> Any:
    """Weights so large that greedy tokens differ between images and positions."""
    for weight in policy.parameters():
        if weight.dim() == 2:
            weight.mul_(20)
    return policy


@pytest.mark.parametrize("num_stretches", [1, 3])
@pytest.mark.parametrize(("text_tokens", "guidance_scale"), [(0, 1.0), (0, 2.0), (5, 2.0)])
def test_the_static_cache_loop_draws_the_engines_greedy_tokens(
    script: Callable[[str], Any],
    case_of: Callable[..., Any],
    text_tokens: int,
    guidance_scale: float,
    num_stretches: int,
) -> None:
    case = case_of(text_tokens, guidance_scale, images=10)  # two prompts of other lengths
    policy = lively(case.policy())
    build = script("static_cache_peer").StaticCachePeer
    peer = build(case, policy, num_stretches=num_stretches, compiled=False, greedy=True)
    params = SamplingParams(guidance_scale=guidance_scale, temperature=0.0)
    expected = RolloutEngine(policy, max_slots=10).draw(case.conditions, params, seed=0).token_ids
    assert len(expected.unique()) > 16
    assert torch.equal(peer.draw()[0], expected)
    assert torch.equal(peer.draw()[0], expected)  # from caches that hold a former draw


@pytest.mark.parametrize("text_tokens", [0, 5])
def test_the_static_cache_loop_says_with_what_probability_it_drew(
    script: Callable[[str], Any], case_of: Callable[..., Any], text_tokens: int
) -> None:
    case = case_of(text_tokens)
    policy = case.policy()
    peer = script("static_cache_peer").StaticCachePeer(case, policy, compiled=False)
    token_ids, logprobs = peer.draw()
    expected = policy.logprobs(case.conditions, token_ids.contiguous(), case.params)
    assert torch.allclose(logprobs, expected, atol=ROUNDING)


def test_the_exponential_race_draws_from_the_policy(
    script: Callable[[str], Any], case_of: Callable[..., Any]
) -> None:
    case = case_of(images=4000)
    decoder = script("static_decoder").StaticDecoder(case, case.policy(), 16, greedy=False)
    decoder.head.data = torch.tensor([[0.0, 1.0, 2.0]]).T.repeat(1, 16) / 16
    torch.manual_seed(0)
    token_ids, _logprobs = decoder.sample(torch.ones(8000, 16))
    shares = token_ids.bincount(minlength=3) / 4000
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    # Four standard deviations of a share of 4,000 draws.
    assert torch.allclose(shares, expected, atol=4 * 0.5 / 4000**0.5)


def test_a_step_of_stretches_reads_no_more_than_it_needs(
    script: Callable[[str], Any], case_of: Callable[..., Any]
) -> None:
    case = case_of(image_size=128)  # 64 tokens
    build = script("static_cache_peer").StaticCachePeer
    peer = build(case, case.policy(), num_stretches=4, compiled=False)
    read: list[int] = []
    call = peer._call

    def noted(token_ids: Any, position: Any, length: int) -> Any:
        read.append(length)
        return call(token_ids, position, length)

    peer._call = noted
    peer.prepare()
    read.clear()
    for position in (1, 15, 16, 63):  # position t is drawn over t + 1 entries
        peer.step(position)
    assert read == [16, 16, 32, 64]


def test_a_step_that_cannot_be_compiled_runs_eagerly_and_the_row_says_so(
    script: Callable[[str], Any],
    case_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(_step: Any, **_options: Any) -> Any:
        def call(*_inputs: Any) -> Any:
            raise RuntimeError("no C++ compiler\nand more")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    case = case_of()
    peer = script("static_cache_peer").StaticCachePeer(case, case.policy())
    assert peer.facts["how"].startswith("eager PyTorch; reads the whole static cache")
    printed = capsys.readouterr().out
    assert printed == "static_cache runs without torch.compile: no C++ compiler\n"
    assert peer.rollout().shape == (3, 16)


@pytest.mark.slow
def test_the_compiled_step_draws_the_engines_greedy_tokens(
    script: Callable[[str], Any], case_of: Callable[..., Any]
) -> None:
    case = case_of()
    policy = lively(case.policy())
    peer = script("static_cache_peer").StaticCachePeer(case, policy, greedy=True)
    assert peer.facts["how"].startswith("torch.compile; ")
    params = SamplingParams(guidance_scale=2.0, temperature=0.0)
    expected = RolloutEngine(policy, max_slots=3).draw(case.conditions, params, seed=0).token_ids
    assert torch.equal(peer.draw()[0], expected)


def written_in_place(step: Callable[[], object], compile_as: Callable[[Any], None]) -> list[bool]:
    """Of the one graph that a step is compiled to: whether each cache keeps its address.

    A recorded CUDA graph may write to such inputs alone; with others the compiler skips recording.
    """
    graphs: list[list[bool]] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        caches = [x for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 4 and len(x) == 6]
        graphs.append([hasattr(cache, "_dynamo_static_input_type") for cache in caches])
        return graph.forward

    compile_as(backend)
    step()
    torch.compiler.reset()
    (only,) = graphs
    return only


@pytest.mark.slow
def test_a_graph_may_write_to_the_static_caches(
    script: Callable[[str], Any], case_of: Callable[..., Any]
) -> None:
    case = case_of()
    peer = script("static_cache_peer").StaticCachePeer(case, case.policy(), compiled=False)
    peer.prepare()

    def compile_as(backend: Any) -> None:
        step = peer._decoder.step
        peer._call = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)

    assert written_in_place(lambda: peer.step(3), compile_as) == [True] * 4


@pytest.mark.slow
def test_a_graph_may_write_to_the_cache_of_transformers(
    script: Callable[[str], Any], case_of: Callable[..., Any]
) -> None:
    pytest.importorskip("transformers")
    peer = script("hf_static_peer").HfStaticPeer(case_of())
    peer.prepare()

    def compile_as(backend: Any) -> None:
        peer._forward = torch.compile(peer._model, fullgraph=True, backend=backend)

    assert written_in_place(lambda: peer.step(3), compile_as) == [True] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("text_tokens", [0, 5])
def test_the_replayed_step_draws_the_eager_steps_greedy_tokens(
    script: Callable[[str], Any], case_of: Callable[..., Any], text_tokens: int
) -> None:
    case = case_of(text_tokens, device="cuda")
    policy = lively(case.policy())
    build = script("static_cache_peer").StaticCachePeer
    eager = build(case, policy, compiled=False, greedy=True)
    replayed = build(case, policy, num_stretches=2, greedy=True)
    expected = eager.draw()[0]
    assert torch.equal(replayed.draw()[0], expected)
    assert torch.equal(replayed.draw()[0], expected)


@pytest.mark.gpu
def test_a_replayed_step_draws_anew(
    script: Callable[[str], Any], case_of: Callable[..., Any]
) -> None:
    case = case_of(device="cuda")
    peer = script("static_cache_peer").StaticCachePeer(case, case.policy())
    # Of 16,384 nearly even tokens each is drawn once in 16,384 times.
    assert not torch.equal(peer.draw()[0][:, 1:], peer.draw()[0][:, 1:])


@pytest.mark.gpu
def test_transformers_llama_runs_compiled_on_a_gpu(
    script: Callable[[str], Any], case_of: Callable[..., Any]
) -> None:
    pytest.importorskip("transformers")
    peer = script("hf_static_peer").HfStaticPeer(case_of(device="cuda"))
    peer.prepare()
    for position in range(1, 20):
        peer.step(position)
    assert peer.rollout().shape == (3, 16)


def test_transformers_llama_runs_over_its_static_cache_again_and_again(
    script: Callable[[str], Any], case_of: Callable[..., Any]
) -> None:
    pytest.importorskip("transformers")
    peer = script("hf_static_peer").HfStaticPeer(case_of(text_tokens=5))
    peer.prepare()
    for position in range(1, 40):  # more steps than the cache has entries
        peer.step(position)
    assert peer._cache.layers[0].keys.shape == (6, 2, 5 + 15, 8)
    token_ids = peer.rollout()
    assert token_ids.shape == (3, 16)
    assert int(peer._cache.layers[1].cumulative_length) == 5 + 15
