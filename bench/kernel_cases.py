"""What a case of the kernel bench is: inputs, contenders, the right result, the least work.

A contender binds to an input set, which is not timed (it may lay the inputs out its own way), and
gives a call, which is. A call returns what can be judged; nothing is timed whose result is wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from timing import Call, Work
from torch import Tensor

# What calls of numeric ops return: tensors in the reference's order, None where one is not made.
Outputs: TypeAlias = tuple[Tensor | None, ...]
Fact: TypeAlias = str | int | float | bool

OURS = "argrpo"
FLOOR = "floor"
# What a peer's result may be off by, in units of what ours may: many keep sums in half precision.
PEER_ROOM = 8.0


class PeerMissingError(Exception):
    """A peer is not installed, or not made for this; the message is for a person."""


@dataclass(frozen=True)
class Sizes:
    """Of a published policy: FoundationVision/LlamaGen at ce98ec4, gpt.py."""

    dim: int
    num_heads: int
    ffn_dim: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


MODELS = {"B": Sizes(768, 12, 2048), "XL": Sizes(1280, 20, 3584), "3B": Sizes(3200, 32, 8704)}
VOCAB_SIZE = 16384


@dataclass(frozen=True)
class Grid:
    """Which sizes to measure."""

    models: tuple[str, ...]
    rows: tuple[int, ...]  # images whose next token is drawn
    images: tuple[int, ...]  # guided images in a decode step: two sequences each
    lengths: tuple[int, ...]  # keys that a new token sees, itself included
    tokens: tuple[int, ...]  # image tokens scored for a loss; a multiple of 256


GPU_GRID = Grid(
    ("XL", "B", "3B"), (8, 32, 64, 128, 256), (8, 32, 64, 128), (64, 128, 256, 576), (2048, 16384)
)
CPU_GRID = Grid(("B",), (8,), (8,), (128,), (2048,))


@dataclass(frozen=True)
class Place:
    """Where the inputs are made, and of what."""

    device: torch.device
    dtype: torch.dtype
    # Its own, because a failed capture leaves the default one unusable.
    generator: torch.Generator

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype) -> "Place":
        return cls(device, dtype, torch.Generator(device).manual_seed(0))

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers of mean 0."""
        values = torch.randn(size, device=self.device, generator=self.generator)
        return values.mul_(scale).to(dtype or self.dtype)

    def integers(self, high: int, *size: int) -> Tensor:
        """Random int64 in 0 .. high - 1."""
        return torch.randint(high, size, device=self.device, generator=self.generator)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case."""

    name: str
    bind: Callable[[Any], Call]
    # (result, expected) -> its error, where 1 is the most that ours may have; None: not comparable
    judge: Callable[[Any, Any], float] | None
    does: str = "the same"  # how its work differs
    allowed: float = PEER_ROOM


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    op: str
    facts: Mapping[str, Fact]
    work: Work
    make: Callable[[], Any]  # an input set of fresh random data
    expect: Callable[[Any], Any]  # the right result for an input set
    contenders: Sequence[Contender]  # ours first

    @property
    def name(self) -> str:
        return ", ".join([self.op, *(f"{key} {value}" for key, value in self.facts.items())])


def bound(function: Callable[[Any], Any]) -> Callable[[Any], Call]:
    """For contenders that take the input set as it is."""
    return lambda inputs: lambda: function(inputs)


class Expected(NamedTuple):
    """The right result, and the plain PyTorch one whose error ours is measured by."""

    wide: Outputs
    plain: Outputs


def expect_from(reference: Callable[[Any], Outputs]) -> Callable[[Any], Expected]:
    """Run a reference on an input record as it is, and in fp32 (half precision) or fp64."""
    return lambda inputs: Expected(reference(_widened(inputs)), reference(inputs))


def numeric_error(result: Outputs, expected: Expected) -> float:
    """Error over twice that of plain PyTorch in the same precision, the largest of all outputs.

    The rule of FlashAttention's tests, Dao-AILab/flash-attention. The 1e-5 is for outputs that
    plain PyTorch gets exactly right.
    """
    ratios = [
        _distance(got, wide) / (2 * _distance(plain, wide) + 1e-5)
        for got, wide, plain in zip(result, expected.wide, expected.plain, strict=False)
        if got is not None and wide is not None and plain is not None
    ]
    if not ratios:
        raise ValueError("result: expected at least one output to compare, got none")
    return max(ratios)


def forward_and_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> Outputs:
    """Outputs, then the gradients of all inputs.

    The leaves are new each time: a node that gradients flow into remembers the stream in which it
    was first used, and a capture has a stream of its own.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    made = function(*leaves)
    outputs = made if isinstance(made, tuple) else (made,)
    found = torch.autograd.grad(outputs, leaves, list(gradients))
    return (*(output.detach() for output in outputs), *found)


def _widened(inputs: Any) -> Any:
    """A flat NamedTuple with its floating tensors in the precision above that of the first."""
    wide = torch.float64 if inputs[0].dtype == torch.float32 else torch.float32

    def widen(field: Any) -> Any:
        is_number = isinstance(field, Tensor) and field.is_floating_point()
        return field.to(wide) if is_number else field

    return type(inputs)(*(widen(field) for field in inputs))


def _distance(got: Tensor, wide: Tensor) -> float:
    """Relative, over all values; infinite where something is not a number."""
    apart = float((got.to(wide.dtype) - wide).norm() / wide.norm())
    return apart if apart < float("inf") else float("inf")
