"""The head and its rows of logits, a chunk of rows at a time, so that [M, V] is never held.

Forward: a chunk of fp32 logits is made by the library GEMM, reduced to three numbers a row, and
dropped. Gradient: a chunk is made, turned into d loss / d logits in the dtype of the weight, and
goes through two products, into the hidden states and into the head weight. The weight's gradient
is summed in fp32 over chunks in a fixed order, so the same input gives the same bits.

Two sizes of chunk on a GPU, for half-precision weights of XL (D = 1280, V = 16,384):

- 512 rows of fp32 logits are 32 MiB and stay in the L2 between the GEMM that writes them and the
  row kernel that reads them.
- 2,048 rows of d logits are 64 MiB. Each chunk reads and writes the fp32 gradient of the weight
  once, 168 MB or 39 us at 4.3 TB/s: with 512 rows that would be 1.2 ms of 16,384 tokens, half the
  time of the three GEMMs; with 2,048 it is 0.3 ms, most of it behind the GEMM's own arithmetic.

A product of 16,384 tokens is 2 M D V = 0.69 TFLOP, 0.87 ms at 790 TFLOP/s: one forward, three
backward; kernels/token_logprobs.py adds up the bytes.

Bitwise the same for the same input, but not for the same row in another batch: where a row falls
in its chunk, and how long the last chunk is, decides how the library's product sums it.

fp32 weights turn the chunk of logits into its gradient in place. On a CPU a chunk is 1 MiB, one
core's L2, but no fewer than 256 rows, below which the GEMM slows down.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from argrpo.kernels._checks import FLOATS, expect
from argrpo.kernels.guidance import head_logits
from argrpo.kernels.row_softmax import row_gradient_, row_scores
from argrpo.kernels.rows import Rows, RowScores

_GPU_LOGITS = 8 * 1024 * 1024  # fp32 logits of one chunk
_GPU_PARTS = 4  # chunks of logits in one chunk of d logits
_CPU_LOGITS = 256 * 1024
_CPU_MIN_ROWS = 256


# (rows of this chunk, their fp32 logits, where d loss / d logits goes: the logits themselves where
# the weight is fp32) -> nothing; the logits need not survive
FillGradient: TypeAlias = Callable[[slice, Tensor, Tensor], None]


class HeadScores(torch.autograd.Function):
    """Log-probs and entropies of rows; the logits are made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        token_ids: Tensor,
        temperature: float,
        support: Tensor | None,
        weight_grad: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        scores = chunked_scores(hidden, head_weight, Rows(token_ids, temperature, support))
        ctx.save_for_backward(hidden, head_weight, token_ids, support, *scores)
        ctx.temperature = temperature
        ctx.weight_grad = weight_grad
        # An output that the loss does not use costs nothing in the backward pass.
        ctx.set_materialize_grads(False)
        return scores.logprobs, scores.entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogprobs: Tensor | None, dentropies: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        if dlogprobs is None and dentropies is None:
            return None, None, None, None, None, None
        hidden, head_weight, token_ids, support, *saved = ctx.saved_tensors
        scores = RowScores(*saved)
        if dlogprobs is None:
            dlogprobs = torch.zeros_like(scores.logprobs)
        # A loss that is a mean sends one number with strides of 0.
        dlogprobs = dlogprobs.contiguous()
        dentropies = None if dentropies is None else dentropies.contiguous()
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = None
        if wants_weight:
            dweight = fp32_zeros(head_weight) if ctx.weight_grad is None else ctx.weight_grad

        rows = Rows(token_ids, ctx.temperature, support)

        def fill(chunk: slice, logits: Tensor, out: Tensor) -> None:
            of_entropy = None if dentropies is None else dentropies[chunk]
            given = rows.part(chunk), scores.part(chunk), dlogprobs[chunk], of_entropy
            row_gradient_(logits, *given, out)

        chunked_gradients(hidden, head_weight, fill, dhidden=dhidden, dweight=dweight)
        if dweight is not None:
            dweight = dweight.to(head_weight.dtype) if ctx.weight_grad is None else None
        return dhidden, dweight, None, None, None, None


def check_head(hidden: Tensor, head_weight: Tensor, rows: Rows, weight_grad: Tensor | None) -> None:
    """ValueError by name if a head cannot be walked with these arguments."""
    expect("hidden", hidden, (None, None), FLOATS)
    expect("head_weight", head_weight, (None, hidden.shape[1]), (hidden.dtype,))
    rows.check(len(hidden), len(head_weight))
    if weight_grad is not None:
        expect("weight_grad", weight_grad, tuple(head_weight.shape), (torch.float32,))


def fp32_zeros(weight: Tensor) -> Tensor:
    """What a weight's gradient is summed in."""
    return torch.zeros_like(weight, dtype=torch.float32)


def chunked_scores(hidden: Tensor, head_weight: Tensor, rows: Rows) -> RowScores:
    """`row_scores` of hidden states [M, D]."""
    scores = RowScores.empty(len(hidden), hidden.device)
    for chunk in _split(slice(0, len(hidden)), _logit_rows(head_weight)):
        row_scores(head_logits(hidden[chunk], head_weight), rows.part(chunk), scores.part(chunk))
    return scores


def chunked_gradients(
    hidden: Tensor,
    head_weight: Tensor,
    fill: FillGradient,
    *,
    dhidden: Tensor | None,
    dweight: Tensor | None,
) -> None:
    """Write d loss / d hidden to `dhidden` [M, D]; add d loss / d weight to `dweight` [V, D] fp32.

    Either may be None.
    """
    for chunk in _split(slice(0, len(hidden)), _gradient_rows(head_weight)):
        dlogits = _dlogits(hidden, head_weight, chunk, fill)
        if dhidden is not None:
            torch.mm(dlogits, head_weight, out=dhidden[chunk])
        if dweight is not None:
            _add_product_(dweight, dlogits.t(), hidden[chunk])
        # Freed before the next chunk asks for its own, or two would be held.
        del dlogits


def _dlogits(hidden: Tensor, head_weight: Tensor, chunk: slice, fill: FillGradient) -> Tensor:
    """[m, V] d loss / d logits of one chunk, in the dtype of the weight."""
    if head_weight.dtype == torch.float32:
        logits = head_logits(hidden[chunk], head_weight)
        fill(chunk, logits, logits)
        return logits
    dlogits = hidden.new_empty(chunk.stop - chunk.start, len(head_weight))
    for part in _split(chunk, _logit_rows(head_weight)):
        logits = head_logits(hidden[part], head_weight)
        fill(part, logits, dlogits[part.start - chunk.start : part.stop - chunk.start])
        # Freed before the next product asks for it, so that both use the same lines of the L2.
        del logits
    return dlogits


def _split(rows: slice, size: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


def _logit_rows(head_weight: Tensor) -> int:
    vocab_size = len(head_weight)
    if head_weight.is_cuda:
        return max(1, _GPU_LOGITS // vocab_size)
    return max(_CPU_MIN_ROWS, _CPU_LOGITS // vocab_size)


def _gradient_rows(head_weight: Tensor) -> int:
    in_place = head_weight.dtype == torch.float32 or not head_weight.is_cuda
    return _logit_rows(head_weight) * (1 if in_place else _GPU_PARTS)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in fp32 whatever the dtype of the factors."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        # Half-precision products on a CPU come back rounded, once a chunk.
        total.addmm_(left.float(), right.float())
