"""Cases of `token_logprobs`: forward, and with the gradients of one or both of its outputs."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

from head_inputs import (
    HeadInputs,
    eager_head,
    eager_logprobs,
    head_inputs,
    head_work,
    one_product,
    three_products,
)
from kernel_cases import (
    FLOOR,
    MODELS,
    OURS,
    Case,
    Contender,
    Fact,
    Grid,
    Outputs,
    Place,
    bound,
    expect_from,
    forward_and_backward,
    numeric_error,
)
from kernel_peers import cut_cross_entropy, liger_cross_entropy
from timing import Call
from torch import Tensor

from argrpo.kernels.token_logprobs import token_logprobs, token_logprobs_reference

# (hidden [M, D], head weight [V, D], token ids [M]) -> log-probs [M] and, where made, entropies [M]
Head: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
EXACT = "no entropy; exact, unfiltered gradients"


def cases(place: Place, grid: Grid) -> Iterator[Case]:
    for model in grid.models:
        for tokens in grid.tokens:
            facts: dict[str, Fact] = {"model": model, "tokens": tokens}
            yield _forward_case(place, MODELS[model].dim, tokens, facts)
            yield _logprob_case(place, MODELS[model].dim, tokens, facts)
            yield _entropy_case(place, MODELS[model].dim, tokens, facts)


def _forward_case(place: Place, dim: int, tokens: int, facts: dict[str, Fact]) -> Case:
    def run(head: Head, inputs: HeadInputs) -> Outputs:
        return head(*inputs[:3])

    def cut(inputs: HeadInputs) -> Call:
        return cut_cross_entropy(*inputs[:3], dlogprobs=None)

    return Case(
        "token_logprobs",
        {**facts, "pass": "forward"},
        head_work(place, dim, tokens, products=1),
        partial(head_inputs, place, dim, tokens, even=True),
        expect_from(partial(run, token_logprobs_reference)),
        [
            Contender(OURS, bound(partial(run, token_logprobs)), numeric_error, allowed=1.0),
            Contender(FLOOR, bound(one_product), None, "the product alone"),
            Contender("torch eager", bound(partial(run, eager_head)), numeric_error),
            Contender("cut-cross-entropy", cut, numeric_error, "no entropy"),
        ],
    )


def _logprob_case(place: Place, dim: int, tokens: int, facts: dict[str, Fact]) -> Case:
    """Gradients of the sum of log-probs: what a cross-entropy gives too."""

    def run(head: Head, inputs: HeadInputs) -> Outputs:
        def scored(hidden: Tensor, head_weight: Tensor) -> Tensor:
            return head(hidden, head_weight, inputs.token_ids)[0]

        logprobs, *gradients = forward_and_backward(scored, inputs[:2], [inputs.dlogprobs])
        return logprobs, None, *gradients

    def liger(inputs: HeadInputs) -> Call:
        return liger_cross_entropy(*inputs[:3])

    def cut(inputs: HeadInputs) -> Call:
        return cut_cross_entropy(*inputs[:4])

    return Case(
        "token_logprobs",
        {**facts, "pass": "forward and backward", "gradients": "of log-probs"},
        head_work(place, dim, tokens, products=3),
        partial(head_inputs, place, dim, tokens, even=True),
        expect_from(partial(run, token_logprobs_reference)),
        [
            Contender(OURS, bound(partial(run, token_logprobs)), numeric_error, allowed=1.0),
            Contender(FLOOR, bound(three_products), None, "the three products alone"),
            Contender(
                "torch eager", bound(partial(run, eager_logprobs)), numeric_error, "no entropy"
            ),
            Contender("liger-kernel", liger, numeric_error, "no entropy; the log-probs' sum"),
            Contender("cut-cross-entropy", cut, numeric_error, EXACT),
        ],
    )


def _entropy_case(place: Place, dim: int, tokens: int, facts: dict[str, Fact]) -> Case:
    """Gradients of log-probs and entropies, each with a scale of its own."""

    def run(head: Head, inputs: HeadInputs) -> Outputs:
        def scored(hidden: Tensor, head_weight: Tensor) -> tuple[Tensor, ...]:
            return tuple(head(hidden, head_weight, inputs.token_ids))

        return forward_and_backward(scored, inputs[:2], inputs[3:5])

    return Case(
        "token_logprobs",
        {**facts, "pass": "forward and backward", "gradients": "of log-probs and entropies"},
        head_work(place, dim, tokens, products=3),
        partial(head_inputs, place, dim, tokens, even=False),
        expect_from(partial(run, token_logprobs_reference)),
        [
            Contender(OURS, bound(partial(run, token_logprobs)), numeric_error, allowed=1.0),
            Contender(FLOOR, bound(three_products), None, "the three products alone"),
            Contender("torch eager", bound(partial(run, eager_head)), numeric_error),
        ],
    )
