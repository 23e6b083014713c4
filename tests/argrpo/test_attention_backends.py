"""flash-attn and xformers in training: what they are given, and what they give back.

Neither installs without a GPU, so here stand-ins under their names compute the same with PyTorch;
whether the packages do is a question for a machine that has them.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from argrpo.config import PolicyConfig, RewardConfig, TokenizerConfig, TrainConfig
from argrpo.engine.conditions import TextFeatures, moved_to
from argrpo.engine.sampling_params import SamplingParams
from argrpo.learner import Learner
from argrpo.models.attention_backends import AttentionName, check_attention, packed_attention
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.trainer import Trainer

PREFIX_LEN = 10
LENGTHS = torch.tensor([2, 10, 7])
NAMES: tuple[AttentionName, ...] = ("flash_attn", "xformers")
# fp32 sums in another order, over a handful of layers, of numbers of size 1.
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
CPU = torch.device("cpu")


class CausalBlocks:
    """Stands for xformers' BlockDiagonalCausalMask."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: torch.device | None = None,
    ) -> "CausalBlocks":
        assert kv_seqlen is None
        assert all(type(length) is int for length in q_seqlen)
        return cls(q_seqlen)


def blockwise(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """[sum of lengths, H, D]: causal attention inside each sequence."""
    assert q.shape[-1] % 8 == 0, "the libraries pad or refuse other head sizes"
    assert sum(lengths) == len(q)
    blocks = zip(*(x.transpose(0, 1).split(list(lengths), dim=1) for x in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(*b, is_causal=True, scale=scale) for b in blocks]
    return torch.cat(outs, dim=1).transpose(0, 1)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    assert cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    assert int(cu_seqlens_q[0]) == dropout_p == 0
    assert max_seqlen_q == max_seqlen_k == max(lengths)
    assert causal
    assert softmax_scale is not None
    return blockwise(q, k, v, lengths, softmax_scale)


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: CausalBlocks | None = None,
    p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    assert len(query) == 1, "sequences of different lengths are one row"
    assert attn_bias is not None
    assert scale is not None
    return blockwise(query[0], key[0], value[0], attn_bias.lengths, scale)[None]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    members: dict[str, dict[str, Any]] = {
        "flash_attn": {"flash_attn_varlen_func": flash_attn_varlen_func},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalCausalMask": CausalBlocks},
    }
    for name, contents in members.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]


def class_policy(**sizes: Any) -> LlamaGen:
    defaults = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "vocab_size": 24}
    policy = LlamaGen(LlamaGenConfig(**{**defaults, "image_size": 64, "num_classes": 4, **sizes}))  # type: ignore[arg-type]
    with torch.no_grad():  # scores and conditions that matter
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return policy


def text_policy(**sizes: Any) -> LlamaGen:
    return class_policy(model_type="t2i", prefix_len=PREFIX_LEN, caption_dim=8, **sizes)


def texts() -> TextFeatures:
    mask = torch.arange(PREFIX_LEN) >= PREFIX_LEN - LENGTHS[:, None]
    return TextFeatures(torch.randn(3, PREFIX_LEN, 8), mask, torch.tensor([2, 0, 1, 2]))


def gradients(policy: LlamaGen, logprobs: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    (logprobs.flatten() * torch.linspace(-1, 1, logprobs.numel()).to(logprobs)).sum().backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [class_policy, text_policy])
@pytest.mark.parametrize("dim", [32, 200])  # head sizes 16 and, as in the 3B model, 100
def test_a_library_is_given_what_makes_the_numbers_of_sdpa(
    name: AttentionName, make: Callable[..., LlamaGen], dim: int
) -> None:
    policy = make(dim=dim)
    conditions = texts() if make is text_policy else torch.tensor([3, 0, 3, 1])
    token_ids, params = torch.randint(0, 24, (4, 16)), SamplingParams(guidance_scale=2.0)
    expected = policy.logprobs(conditions, token_ids, params)
    wanted = gradients(policy, expected)
    policy.attention = name
    found = policy.logprobs(conditions, token_ids, params)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert wanted.keys() == {name for name, p in policy.named_parameters()}
    for parameter, gradient in gradients(policy, found).items():
        # Sums over images and positions: their error is that of the largest entry.
        atol = 1e-5 * float(wanted[parameter].abs().max())
        torch.testing.assert_close(
            gradient,
            wanted[parameter],
            atol=atol,
            rtol=1e-4,
            msg=lambda t, n=parameter: f"{n}: {t}",
        )


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_one_token_needs_its_condition_alone(name: AttentionName) -> None:
    policy, one = text_policy().requires_grad_(False), torch.zeros(4, 1, dtype=torch.int64)
    conditions = texts()
    expected = policy.hidden(conditions, one)
    policy.attention = name
    torch.testing.assert_close(policy.hidden(conditions, one), expected, **TOLERANCE)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_last_position_is_refused(name: AttentionName) -> None:
    policy, left = text_policy(text_padding="right"), texts()
    policy.attention = name
    right = TextFeatures(left.features, left.mask.flip(1), left.index)
    with pytest.raises(ValueError, match=r"policy.attention: expected sdpa .* padded last"):
        policy.hidden(right, torch.zeros(4, 16, dtype=torch.int64))


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_refused_with_the_extra_that_brings_it(name: AttentionName) -> None:
    message = rf"policy.attention: expected an installed package, got {name} .*argrpo\[attention\]"
    with pytest.raises(ValueError, match=message):
        packed_attention(name, [1], CPU)
    with pytest.raises(ValueError, match=message):
        check_attention(name, torch.device("cuda"), torch.bfloat16)
    check_attention("sdpa", CPU, torch.float32)


def run_config(output_dir: str, attention: AttentionName) -> TrainConfig:
    return TrainConfig(
        output_dir=output_dir,
        policy=PolicyConfig(path="not there", attention=attention),
        tokenizer=TokenizerConfig(path="not there"),
        rewards=[RewardConfig(name="clip")],
        device="cpu",
    )


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_refused_before_anything_is_read_or_written(
    name: AttentionName, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"policy.attention: .*argrpo\[attention\]"):
        Trainer(run_config(str(tmp_path / "run"), name))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("stand_ins")
def test_policy_and_reference_attend_as_the_run_says() -> None:
    policy = class_policy()
    learner = Learner(policy, run_config("unused", "flash_attn"))
    assert learner._reference is not None
    with learner._reference.on_device() as reference:
        assert (policy.attention, reference.attention) == ("flash_attn", "flash_attn")


@pytest.mark.usefixtures("stand_ins")
def test_a_device_or_dtype_that_a_package_does_not_know_is_refused_by_name() -> None:
    for name in NAMES:
        with pytest.raises(ValueError, match=f"expected sdpa on a cpu, got {name}"):
            check_attention(name, CPU, torch.bfloat16)
        check_attention(name, torch.device("cuda"), torch.bfloat16)
    check_attention("xformers", torch.device("cuda"), torch.float32)
    with pytest.raises(ValueError, match=r"expected sdpa or xformers .* float32"):
        check_attention("flash_attn", torch.device("cuda"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [128, 200])
def test_the_real_package_gives_the_numbers_of_sdpa(name: AttentionName, dim: int) -> None:
    pytest.importorskip(name, reason="an optional package that few machines have built")
    policy, conditions = text_policy(dim=dim).to("cuda", torch.bfloat16), texts()
    conditions = moved_to(conditions, torch.device("cuda"))
    token_ids = torch.randint(0, 24, (4, 16), device="cuda")
    found: dict[AttentionName, dict[str, Tensor]] = {}
    attentions: tuple[AttentionName, ...] = ("sdpa", name)
    for attention in attentions:
        policy.attention = attention
        logprobs = policy.logprobs(conditions, token_ids, SamplingParams())
        found[attention] = {"logprobs": logprobs.detach(), **gradients(policy, logprobs)}
    for quantity, expected in found["sdpa"].items():
        apart = (found[name][quantity] - expected).norm() / expected.norm()
        # bf16 rounds every activation to 2^-9, two layers deep, in another order.
        assert float(apart) < 0.05, quantity
