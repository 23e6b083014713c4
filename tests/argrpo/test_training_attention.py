"""How whole images attend in training, against one causal sequence under a dense mask."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from argrpo.engine.attention import CausalAttend, prefix_allowed
from argrpo.engine.conditions import Conditions, TextFeatures, moved_to
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.training_attention import attend_after_mean, count_columns

PREFIX_LEN = 12
LENGTHS = (1, 12, 5)  # one position, all of them, between
ORDER = (0, 2, 0, 1, 2, 0)  # images of a prompt need not be neighbours
# fp32 sums in another order, over a handful of layers, of numbers of size 1.
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
DRAWS = {"conditional": SamplingParams(), "guided": SamplingParams(guidance_scale=3.0)}

Gradients = dict[str, Tensor]


def make_policy(**sizes: Any) -> LlamaGen:
    defaults = {"dim": 32, "num_layers": 3, "num_heads": 2, "ffn_dim": 32, "vocab_size": 24}
    text = {"model_type": "t2i", "prefix_len": PREFIX_LEN, "caption_dim": 8}
    policy = LlamaGen(LlamaGenConfig(**{**defaults, "image_size": 64, **text, **sizes}))  # type: ignore[arg-type]
    with torch.no_grad():  # scores and text that matter: with the usual 0.02 all look the same
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return policy


def make_texts(
    lengths: tuple[int, ...] = LENGTHS, order: tuple[int, ...] = ORDER, padding: str = "left"
) -> TextFeatures:
    mask = torch.arange(PREFIX_LEN) >= PREFIX_LEN - torch.tensor(lengths)[:, None]
    if padding == "right":
        mask = mask.flip(1)
    return TextFeatures(torch.randn(len(lengths), PREFIX_LEN, 8), mask, torch.tensor(order))


def dense_hidden(policy: LlamaGen, conditions: Conditions, token_ids: Tensor) -> Tensor:
    """Every image with a prefix of its own, in one sequence under a mask [N, 1, S, S]."""
    prefix = policy.embed_conditions(conditions)
    x = torch.cat([prefix.embeddings, policy.tok_embeddings(token_ids[:, :-1])], dim=1)
    allowed, last = prefix_allowed(prefix.mask, x.shape[1]), policy.config.prefix_len - 1
    allowed[:, :, last, last] &= prefix.mask[:, -1:] | policy.end_sees_itself
    attend = CausalAttend(policy.rotary[: x.shape[1]], allowed)
    return policy.trunk(x, attend)[:, last:].contiguous()


def scored(
    policy: LlamaGen, conditions: Conditions, token_ids: Tensor, params: SamplingParams
) -> tuple[Tensor, Gradients]:
    """Log-probs, and the gradient of a weighted sum of them by every parameter's name."""
    policy.zero_grad()
    logprobs = policy.logprobs(conditions, token_ids, params)
    weights = torch.linspace(-1, 1, logprobs.numel(), device=logprobs.device)
    (logprobs.flatten() * weights).sum().backward()
    named = policy.named_parameters()
    return logprobs.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_same(one: tuple[Tensor, Gradients], other: tuple[Tensor, Gradients]) -> None:
    torch.testing.assert_close(one[0], other[0], **TOLERANCE)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        # Sums over images and positions: their error is that of the largest entry.
        atol = 1e-5 * float(other[1][name].abs().max())
        torch.testing.assert_close(
            gradient, other[1][name], atol=atol, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}"
        )


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("dim", [32, 200])  # head sizes 16 and, as in the 3B model, 100
def test_texts_read_once_give_the_numbers_of_the_dense_mask(
    draw: str, is_checkpointed: bool, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, texts = make_policy(dim=dim), make_texts()
    token_ids = torch.randint(0, 24, (len(ORDER), 16))
    policy.checkpoints_layers = is_checkpointed
    ours = scored(policy, texts, token_ids, DRAWS[draw])
    monkeypatch.setattr(LlamaGen, "hidden", dense_hidden)
    expected = scored(policy, texts, token_ids, DRAWS[draw])
    assert_same(ours, expected)
    reached = {name for name, gradient in ours[1].items() if gradient.any()}
    assert {"layers.0.attention.wqkv.weight", "cls_embedding.cap_proj.fc1.weight"} <= reached
    assert ("cls_embedding.uncond_embedding" in reached) == (draw == "guided")


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("sees_itself", [True, False])
@pytest.mark.parametrize("has_rotary", [False, True])
def test_a_padded_last_position_gives_the_numbers_of_the_dense_mask(
    draw: str, sees_itself: bool, has_rotary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, texts = make_policy(text_padding="right"), make_texts(padding="right")
    policy.check_conditions(texts)
    policy.end_sees_itself = sees_itself
    if has_rotary:
        policy._rotary = policy.rotary.clone()
        policy._rotary[:PREFIX_LEN, :, 0] = 1
    token_ids = torch.randint(0, 24, (len(ORDER), 16))
    ours = scored(policy, texts, token_ids, DRAWS[draw])
    monkeypatch.setattr(LlamaGen, "hidden", dense_hidden)
    assert_same(ours, scored(policy, texts, token_ids, DRAWS[draw]))


@torch.no_grad()
def test_whether_a_padded_last_position_sees_itself_changes_token_0_of_short_texts_alone() -> None:
    policy, texts = make_policy(text_padding="right"), make_texts(padding="right")
    token_ids = torch.randint(0, 24, (len(ORDER), 16))
    drawn = policy.logprobs(texts, token_ids, SamplingParams())
    policy.end_sees_itself = False
    difference = (policy.logprobs(texts, token_ids, SamplingParams()) - drawn).abs()
    is_short = torch.tensor([LENGTHS[prompt] < PREFIX_LEN for prompt in ORDER])
    assert difference[is_short, 0].min() > 1e-3
    difference[is_short, 0] = 0
    assert not difference.any()


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_the_start_of_an_image_scores_as_in_the_whole(num_tokens: int) -> None:
    policy, texts = make_policy().requires_grad_(False), make_texts()
    token_ids = torch.randint(0, 24, (len(ORDER), 16))
    whole = policy.hidden(texts, token_ids)
    torch.testing.assert_close(
        policy.hidden(texts, token_ids[:, :num_tokens]), whole[:, :num_tokens], **TOLERANCE
    )


def test_the_trunk_sees_the_valid_positions_of_each_prompt_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, texts = make_policy(), make_texts()
    fed, trunk = [], policy.trunk
    monkeypatch.setattr(policy, "trunk", lambda x, attend: fed.append(x.shape) or trunk(x, attend))
    token_ids = torch.zeros(len(ORDER), 16, dtype=torch.int64)
    policy.hidden(texts, token_ids)
    policy.hidden(make_texts(padding="right"), token_ids)
    whole = sum(LENGTHS) + len(ORDER) * 15
    padded_ends = sum(length < PREFIX_LEN for length in LENGTHS)
    assert fed == [(1, whole, 32), (1, whole + padded_ends, 32)]


def test_every_layer_of_a_text_policy_runs_on_flash_attention_both_ways() -> None:
    policy = make_policy()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # which takes no mask; anything else raises
        hidden = policy.hidden(make_texts(), torch.zeros(len(ORDER), 16, dtype=torch.int64))
        hidden.sum().backward()


@pytest.mark.parametrize("lengths", [(12, 12), (3, 12)])
def test_a_prefix_with_a_rotary_embedding_is_masked_only_where_it_is_padded(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, texts = make_policy(), make_texts(lengths, (1, 0, 1))
    token_ids = torch.randint(0, 24, (3, 16))
    policy._rotary = policy.rotary.clone()
    policy._rotary[:PREFIX_LEN, :, 0] = 1
    masks, attention = [], F.scaled_dot_product_attention

    def spy(*args: Tensor, **options: Any) -> Tensor:
        masks.append(options.get("attn_mask"))
        return attention(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        ours = scored(policy, texts, token_ids, SamplingParams())
    assert [mask is None for mask in masks] == [min(lengths) == 12] * 3
    monkeypatch.setattr(LlamaGen, "hidden", dense_hidden)
    assert_same(ours, scored(policy, texts, token_ids, SamplingParams()))


def mean_by_hand(q: Tensor, k: Tensor, v: Tensor, mean: Tensor, counts: Tensor) -> Tensor:
    """The entries one by one, in the dtype that came in."""
    rows = []
    for n, count in enumerate(counts.tolist()):
        keys = torch.cat([k.new_zeros(count, *k.shape[2:]), k[n]])
        values = torch.cat([mean[n].expand(count, -1, -1).to(v.dtype), v[n]])
        seen = torch.ones(len(q[n]), len(keys), dtype=torch.bool).tril(count)
        scores = torch.einsum("shd,thd->hst", q[n], keys) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        rows.append(torch.einsum("hst,thd->shd", weights, values))
    return torch.stack(rows)


@pytest.mark.parametrize("head_dim", [8, 64, 100])
def test_entries_of_score_zero_count_as_many(head_dim: int) -> None:
    counts = torch.tensor([1, 3, 120])
    tensors = {name: torch.randn(3, 9, 2, head_dim) for name in ("q", "k", "v")}
    tensors["mean"] = torch.randn(3, 2, head_dim)
    exact = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    ours = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    out = attend_after_mean(**ours, columns=count_columns(counts, head_dim))
    expected = mean_by_hand(**exact, counts=counts)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, list(ours.values()), upstream)
    wanted = torch.autograd.grad(expected, list(exact.values()), upstream.double())
    for name, one, other in zip(ours, gradients, wanted, strict=True):
        torch.testing.assert_close(
            one.double(), other, **TOLERANCE, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_a_count_loses_nothing_in_bf16() -> None:
    """What log(count) rounded to bf16 would lose shows on values that only the texts have."""
    counts = torch.arange(1, 121)
    q = k = v = torch.zeros(120, 1, 1, 64, dtype=torch.bfloat16)
    out = attend_after_mean(q, k, v, torch.ones(120, 1, 64), count_columns(counts, 64))
    share = (counts / (counts + 1))[:, None].expand(-1, 64)
    # Rounded once, at the end: half a unit in the last place, and as much again for the weights,
    # which kernels round to bf16 before they multiply values with them.
    torch.testing.assert_close(out[:, 0, 0].float(), share, rtol=2**-8, atol=0)


@torch.no_grad()
def test_bf16_is_as_exact_as_under_the_dense_mask() -> None:
    policy, texts = make_policy().bfloat16(), make_texts()
    token_ids = torch.randint(0, 24, (len(ORDER), 16))
    ours, dense = policy.hidden(texts, token_ids), dense_hidden(policy, texts, token_ids)
    exact = dense_hidden(policy.float(), texts, token_ids)
    # Rounding of other sums: as large, not the same.
    assert (ours - exact).norm() <= 1.5 * (dense - exact).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_numbers_of_the_dense_mask(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(dim=128).to("cuda", dtype)
    texts = moved_to(make_texts(), torch.device("cuda"))
    token_ids = torch.randint(0, 24, (len(ORDER), 16), device="cuda")
    logprobs, gradients = scored(policy, texts, token_ids, DRAWS["guided"])
    monkeypatch.setattr(LlamaGen, "hidden", dense_hidden)
    expected, wanted = scored(policy, texts, token_ids, DRAWS["guided"])
    # bf16 rounds every activation to 2^-9, three layers deep; fp32 kernels sum in another order.
    rtol = 0.05 if dtype == torch.bfloat16 else 1e-4
    assert float((logprobs - expected).norm() / expected.norm()) < rtol
    for name, gradient in gradients.items():
        apart = float((gradient - wanted[name]).norm() / wanted[name].norm())
        assert apart < rtol, name
