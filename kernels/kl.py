"""The k3 estimate of a KL divergence, from the log-probs of sampled tokens alone.

    k3 = exp(d) - 1 - d,   d = ref_logprob - logprob

Never negative, and unbiased where the tokens were drawn from the policy. Everything in this
project that speaks of a KL per token means this function.

Source: J. Schulman, "Approximating KL divergence" (2020), http://joschu.net/blog/kl-approx.html.
"""

import torch
from torch import Tensor


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference), token by token. Differentiable in both.

    Args:
        logprobs: of the policy; any shape, floating.
        ref_logprobs: of the reference; shape and dtype of `logprobs`.

    Returns:
        Nats, in the shape of `logprobs`.
    """
    difference = ref_logprobs - logprobs
    # exp(d) - 1 by itself would lose k3 to rounding: at d = 1e-3 it is 5e-7, an ulp of 1 is 1e-7.
    return torch.expm1(difference) - difference
