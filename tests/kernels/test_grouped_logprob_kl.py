"""grouped_logprob_kl of kernels/token_logprobs.py: policy, reference, KL and means over groups.

Each test runs with the kernels (Triton's interpreter, or a GPU) and on the path of a CPU.

Tolerance in fp32: as in test_token_logprobs.py; a KL of size 1 sits on log-probs of size 10, so its
relative error is ten times theirs.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from argrpo.kernels import guided_hidden, row_softmax
from argrpo.kernels.kl import k3
from argrpo.kernels.token_filter import pack_support
from argrpo.kernels.token_logprobs import (
    GroupedLogprobs,
    HeadStates,
    grouped_logprob_kl,
    grouped_logprob_kl_reference,
)

TOLERANCE = 2e-5
GROUPS = (2, 2, 3)  # P, G, T
WIDTH = 16
SCALE = 2.5


@pytest.fixture(params=["kernel", "cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Runs each test on both implementations."""
    if request.param == "cpu":
        for module in (row_softmax, guided_hidden):
            monkeypatch.setattr(module, "uses_triton", lambda tensor: False)
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Case(NamedTuple):
    policy: HeadStates
    reference: HeadStates
    token_ids: Tensor
    support: Tensor | None

    def double(self) -> "Case":
        return self._replace(policy=leaves(self.policy), reference=leaves(self.reference))


def leaves(states: HeadStates) -> HeadStates:
    """The same numbers in fp64, as leaves of their own."""
    return HeadStates(*(None if t is None else _leaf(t.double()) for t in states))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def make_case(
    device: torch.device, num_guided: int | None = None, kept: float | None = None, vocab: int = 999
) -> Case:
    """num_guided: tokens of an image that an unconditional branch guides; None: no such branch."""
    base = 3 * WIDTH**-0.5 * torch.randn(vocab, WIDTH, device=device)

    def states() -> HeadStates:
        hidden = _leaf(torch.randn(*GROUPS, WIDTH, device=device))
        weight = _leaf(base + 0.3 * torch.randn(vocab, WIDTH, device=device))
        if num_guided is None:
            return HeadStates(hidden, weight)
        uncond = _leaf(torch.randn(*GROUPS[:2], num_guided, WIDTH, device=device))
        return HeadStates(hidden, weight, uncond)

    support = None
    if kept is not None:
        bits = pack_support(torch.rand(12, vocab, device=device) < kept)
        support = bits.view(*GROUPS, -1)
    return Case(states(), states(), torch.randint(vocab, GROUPS, device=device), support)


def run(op: Callable[..., GroupedLogprobs], case: Case, **options: object) -> GroupedLogprobs:
    settings = {"guidance_scale": SCALE, "temperature": 0.8, "support": case.support, **options}
    return op(case.policy, case.token_ids, case.reference, **settings)


def policy_gradients(outputs: list[Tensor], scales: list[Tensor], case: Case) -> dict[str, Tensor]:
    named = {n: t for n, t in case.policy._asdict().items() if t is not None}
    scaled = [s.to(o.dtype) for o, s in zip(outputs, scales, strict=True)]
    found = torch.autograd.grad(outputs, list(named.values()), scaled, retain_graph=True)
    return dict(zip(named, found, strict=True))


def assert_close(name: str, got: Tensor, want: Tensor) -> None:
    off = (got.double() - want).abs().max() / want.abs().max()
    assert off <= TOLERANCE, f"{name}: off by {off:.2e} of its largest entry"


@pytest.mark.parametrize("kept", [None, 0.1], ids=["all", "support"])
@pytest.mark.parametrize("num_guided", [None, 3, 2], ids=["conditional", "guided", "interval"])
def test_outputs_and_gradients_agree_with_fp64(
    num_guided: int | None, kept: float | None, device: torch.device
) -> None:
    case = make_case(device, num_guided, kept)
    wide = case.double()
    got, want = run(grouped_logprob_kl, case), run(grouped_logprob_kl_reference, wide)
    for name, one, other in zip(got._fields, got, want, strict=True):
        assert one.dtype == torch.float32, name
        assert_close(name, one, other)
    differentiable = [n for n in got._fields if "ref" not in n]
    for names in [[n] for n in differentiable if "group" not in n] + [differentiable]:
        scales = [torch.randn_like(getattr(got, n)) for n in names]
        pairs = ((got, case), (want, wide))
        mine, theirs = (
            policy_gradients([getattr(o, n) for n in names], scales, c) for o, c in pairs
        )
        for leaf, expected in theirs.items():
            assert_close(f"d {leaf} of {'+'.join(names)}", mine[leaf], expected)


def test_both_branches_share_one_mixed_gradient(device: torch.device) -> None:
    case = make_case(device, num_guided=3)
    got = run(grouped_logprob_kl, case)
    gradients = policy_gradients([got.logprobs], [torch.randn_like(got.logprobs)], case)
    mixed = gradients["hidden"] / SCALE
    # Two roundings of a product each.
    torch.testing.assert_close(gradients["uncond"], (1.0 - SCALE) * mixed, rtol=3e-7, atol=0)


def test_tokens_past_the_guided_ones_are_those_of_the_conditional_model(
    device: torch.device,
) -> None:
    case = make_case(device, num_guided=2)
    plain = case._replace(
        policy=case.policy._replace(uncond=None), reference=case.reference._replace(uncond=None)
    )
    guided, conditional = run(grouped_logprob_kl, case), run(grouped_logprob_kl, plain)
    for name in ("logprobs", "entropies", "ref_logprobs", "kl"):
        one, other = getattr(guided, name), getattr(conditional, name)
        assert torch.equal(one[..., 2:], other[..., 2:]), name
        assert not torch.isclose(one[..., :2], other[..., :2]).any(), name


def test_means_are_over_the_tokens_of_a_group(device: torch.device) -> None:
    got = run(grouped_logprob_kl, make_case(device))
    for name in ("logprobs", "entropies", "ref_logprobs", "kl"):
        want = getattr(got, name).double().mean(dim=(1, 2))
        mean = getattr(got, f"group_{name}")
        assert mean.shape == (2,), name
        torch.testing.assert_close(mean.double(), want, rtol=1e-6, atol=1e-7)


def test_the_kl_is_k3_of_the_log_probs_beside_it(device: torch.device) -> None:
    got = run(grouped_logprob_kl, make_case(device))
    assert torch.equal(got.kl, k3(got.logprobs, got.ref_logprobs))
    assert (got.kl > 0).all()


def test_a_policy_has_no_kl_to_itself(device: torch.device) -> None:
    case = make_case(device, num_guided=3, kept=0.5)
    got = run(grouped_logprob_kl, case._replace(reference=case.policy))
    assert torch.equal(got.logprobs, got.ref_logprobs)
    assert (got.kl == 0).all()
    for name, gradient in policy_gradients([got.kl.sum()], [torch.ones([])], case).items():
        assert (gradient == 0).all(), name


def test_the_support_renormalises_policy_and_reference_alike(device: torch.device) -> None:
    # Four kept tokens: their probabilities, asked for one by one, sum to one for both models.
    case = make_case(device, num_guided=3, vocab=64)
    kept = torch.zeros(12, 64, dtype=torch.bool, device=device)
    kept[:, [3, 17, 40, 63]] = True
    case = case._replace(support=pack_support(kept).view(*GROUPS, -1))
    totals = dict.fromkeys(("logprobs", "ref_logprobs"), 0.0)
    for token in (3, 17, 40, 63):
        got = run(
            grouped_logprob_kl, case._replace(token_ids=torch.full_like(case.token_ids, token))
        )
        totals = {name: total + getattr(got, name).exp() for name, total in totals.items()}
    for name, total in totals.items():
        torch.testing.assert_close(total, torch.ones_like(total), msg=f"{name}: {total}")


def test_the_reference_receives_no_gradient(device: torch.device) -> None:
    case = make_case(device, num_guided=3)
    got = run(grouped_logprob_kl, case)
    assert not got.ref_logprobs.requires_grad
    assert not got.group_ref_logprobs.requires_grad
    got.group_kl.sum().backward()
    assert [t.grad for t in case.reference] == [None, None, None]


def test_without_a_reference_there_is_no_kl(device: torch.device) -> None:
    case = make_case(device)
    alone, both = (run(grouped_logprob_kl, c) for c in (case._replace(reference=None), case))
    for name in ("ref_logprobs", "kl", "group_ref_logprobs", "group_kl"):
        assert getattr(alone, name) is None, name
    assert torch.equal(alone.logprobs, both.logprobs)
    assert torch.equal(alone.group_entropies, both.group_entropies)


def test_the_same_input_twice_gives_the_same_bits(device: torch.device) -> None:
    case = make_case(device, num_guided=3, kept=0.5)
    results = []
    for _ in range(2):
        got = run(grouped_logprob_kl, case)
        outputs = [got.group_logprobs, got.group_kl, got.group_entropies]
        gradients = policy_gradients(outputs, [torch.ones(2, device=device)] * 3, case)
        results.append({**got._asdict(), **{f"d {n}": g for n, g in gradients.items()}})
    for name, values in results[0].items():
        assert torch.equal(values, results[1][name]), name


def test_weight_grad_takes_the_gradient_of_the_policys_head(device: torch.device) -> None:
    case = make_case(device)
    returned = policy_gradients(
        [run(grouped_logprob_kl, case).kl], [torch.ones(GROUPS, device=device)], case
    )
    total = torch.zeros_like(case.policy.head_weight)
    run(grouped_logprob_kl, case, weight_grad=total).kl.sum().backward()
    assert case.policy.head_weight.grad is None
    assert torch.equal(total, returned["head_weight"])


def test_wrong_inputs_are_refused_by_name(device: torch.device) -> None:
    good = make_case(device, num_guided=3, kept=0.5, vocab=64)
    policy, reference, token_ids, support = good
    hidden, weight, uncond = policy
    scattered = hidden.transpose(2, 3).contiguous().transpose(2, 3)
    cases = [
        ("policy.hidden", good._replace(policy=policy._replace(hidden=scattered))),
        ("token_ids", good._replace(token_ids=token_ids.flatten(0, 1))),
        ("token_ids", good._replace(token_ids=token_ids.int())),
        (
            "token_ids",
            good._replace(token_ids=token_ids.transpose(0, 1).contiguous().transpose(0, 1)),
        ),
        ("policy.hidden", good._replace(policy=policy._replace(hidden=hidden[:1]))),
        ("policy.hidden", good._replace(policy=policy._replace(hidden=hidden.double()))),
        ("policy.uncond", good._replace(policy=policy._replace(uncond=uncond[:, :1]))),
        ("policy.uncond", good._replace(policy=policy._replace(uncond=uncond.bfloat16()))),
        ("head_weight", good._replace(policy=policy._replace(head_weight=weight[:, :8]))),
        ("reference.uncond", good._replace(reference=reference._replace(uncond=None))),
        ("reference.hidden", good._replace(reference=reference._replace(hidden=hidden[..., :8]))),
        ("support", good._replace(support=support[..., :4])),
        ("support", good._replace(support=support[:1])),
    ]
    for name, bad in cases:
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            run(grouped_logprob_kl, bad)
    with pytest.raises(ValueError, match=r"^temperature: expected"):
        run(grouped_logprob_kl, good, temperature=0.0)
    with pytest.raises(ValueError, match=r"^weight_grad: expected"):
        run(grouped_logprob_kl, good, weight_grad=torch.zeros(64, 8, device=device))
