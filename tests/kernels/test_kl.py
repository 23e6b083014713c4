"""kernels/kl.py, the k3 estimate."""

import torch

from argrpo.kernels.kl import k3


def test_k3_is_the_textbook_formula() -> None:
    logprobs, ref_logprobs = torch.randn(2, 63, dtype=torch.float64)
    d = ref_logprobs - logprobs
    torch.testing.assert_close(k3(logprobs, ref_logprobs), d.exp() - d - 1.0)


def test_k3_of_nearly_equal_models_is_not_lost_to_rounding() -> None:
    # exp(d) - 1 - d in fp32 has no correct digit here: the terms are 1, the result is 5e-9.
    d = torch.tensor([1e-4, -1e-4, 0.0])
    want = torch.expm1(d.double()) - d.double()
    torch.testing.assert_close(k3(torch.zeros(3), d).double(), want, rtol=1e-3, atol=0)


def test_the_gradient_is_one_minus_the_ratio() -> None:
    logprobs = torch.randn(9, dtype=torch.float64, requires_grad=True)
    ref_logprobs = torch.randn(9, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(k3(logprobs, ref_logprobs).sum(), logprobs)
    torch.testing.assert_close(gradient, 1.0 - torch.exp(ref_logprobs - logprobs.detach()))


def test_k3_averages_to_the_divergence_over_the_policys_tokens() -> None:
    policy, reference = torch.randn(2, 50, dtype=torch.float64).log_softmax(dim=1)
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * k3(policy, reference)).sum(), exact)
