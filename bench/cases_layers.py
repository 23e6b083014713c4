"""Cases of the small operations around the products of a layer. R rows, D and F widths."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from kernel_cases import (
    MODELS,
    OURS,
    Case,
    Contender,
    Grid,
    Outputs,
    Place,
    bound,
    expect_from,
    forward_and_backward,
    numeric_error,
)
from kernel_peers import liger_layer
from timing import Call, Work
from torch import Tensor
from torch.nn import functional as F

from argrpo.kernels import gelu, guided_hidden, layernorm, rmsnorm, swiglu

EPS = 1e-5
GUIDANCE_SCALE = 2.0
# Of a taming transformer, a policy with layer norms and biases.
TAMING_DIM, TAMING_FFN = 1536, 6144


class LayerInputs(NamedTuple):
    """At most three inputs and two gradients of outputs."""

    first: Tensor
    second: Tensor | None
    third: Tensor | None
    fourth: Tensor | None
    dy: Tensor | None
    dtotal: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self[:4] if tensor is not None]

    @property
    def gradients(self) -> list[Tensor]:
        return [tensor for tensor in self[4:] if tensor is not None]


@dataclass(frozen=True)
class Layer:
    """One op: what it takes, what it moves, who else does it."""

    op: str
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: Callable[[int, int], Sequence[tuple[int, ...]]]  # (rows, width) -> of the inputs
    moved: tuple[int, int]  # values a row and column, forward and backward
    out_shape: Callable[[int, int], tuple[int, ...]]
    num_outputs: int = 1
    torch_op: Callable[..., Any] | None = None  # the library's own, where the reference is not it


def cases(place: Place, grid: Grid) -> Iterator[Case]:
    for model in grid.models:
        sizes = MODELS[model]
        for layer, width in (
            (RMSNORM, sizes.dim),
            (RMSNORM_RESIDUAL, sizes.dim),
            (SWIGLU, sizes.ffn_dim),
            (GUIDED_HIDDEN, sizes.dim),
        ):
            yield from _layer_cases(place, grid, layer, width, model)
    for layer, width in (
        (LAYERNORM, TAMING_DIM),
        (LAYERNORM_RESIDUAL, TAMING_DIM),
        (BIAS_GELU, TAMING_FFN),
    ):
        yield from _layer_cases(place, grid, layer, width, "taming")


def _layer_cases(place: Place, grid: Grid, layer: Layer, width: int, model: str) -> Iterator[Case]:
    # A training pass over the most tokens; a decode step of the most images, both branches.
    passes = [(max(grid.tokens), True)] if grid.tokens else []
    if grid.images and layer is not GUIDED_HIDDEN:
        passes.insert(0, (2 * max(grid.images), False))
    for rows, backward in passes:
        values = sum(layer.moved) if backward else layer.moved[0]
        run = _both if backward else _forward
        yield Case(
            layer.op,
            {
                "model": model,
                "rows": rows,
                "width": width,
                "pass": "forward and backward" if backward else "forward",
            },
            Work(values * rows * width * place.itemsize, 0),
            partial(_make, place, layer, rows, width, backward),
            expect_from(partial(run, layer.reference)),
            _contenders(layer, run),
        )


def _contenders(
    layer: Layer, run: Callable[[Callable[..., Any], LayerInputs], Outputs]
) -> list[Contender]:
    def contender(name: str, function: Callable[..., Any]) -> Contender:
        return Contender(name, bound(partial(run, function)), numeric_error)

    def liger(inputs: LayerInputs) -> Call:
        function = liger_layer(layer.op, EPS)  # raises where there is none
        return lambda: run(function, inputs)

    ours = Contender(OURS, bound(partial(run, layer.ours)), numeric_error, allowed=1.0)
    found = [ours, contender("torch eager", layer.reference)]
    if layer.torch_op is not None:
        found.append(contender("torch library", layer.torch_op))
    return [*found, Contender("liger-kernel", liger, numeric_error)]


def _make(place: Place, layer: Layer, rows: int, width: int, backward: bool) -> LayerInputs:
    first, *others = (place.normal(*shape) for shape in layer.shapes(rows, width))
    second, third, fourth = [*others, None, None, None][:3]
    count = layer.num_outputs if backward else 0
    gradients = [place.normal(*layer.out_shape(rows, width)) for _ in range(count)]
    dy, dtotal = [*gradients, None, None][:2]
    return LayerInputs(first, second, third, fourth, dy, dtotal)


def _forward(function: Callable[..., Any], inputs: LayerInputs) -> Outputs:
    made = function(*inputs.tensors)
    return made if isinstance(made, tuple) else (made,)


def _both(function: Callable[..., Any], inputs: LayerInputs) -> Outputs:
    return forward_and_backward(function, inputs.tensors, inputs.gradients)


def _library_rmsnorm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def _library_rmsnorm_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _library_rmsnorm(total, weight), total


def _same(rows: int, width: int) -> tuple[int, ...]:
    return (rows, width)


def _images(rows: int, width: int) -> tuple[int, ...]:
    return (rows // 256, 256, width)


def _last(function: Callable[..., Any], value: float) -> Callable[..., Any]:
    """The function with its last argument given."""
    return lambda *tensors: function(*tensors, value)


RMSNORM = Layer(
    "rmsnorm",
    _last(rmsnorm.rmsnorm, EPS),
    _last(rmsnorm.rmsnorm_reference, EPS),
    lambda rows, width: [(rows, width), (width,)],
    (2, 3),
    _same,
    torch_op=_library_rmsnorm,
)
RMSNORM_RESIDUAL = Layer(
    "rmsnorm_residual",
    _last(rmsnorm.rmsnorm_residual, EPS),
    _last(rmsnorm.rmsnorm_residual_reference, EPS),
    lambda rows, width: [(rows, width), (rows, width), (width,)],
    (4, 4),
    _same,
    num_outputs=2,
    torch_op=_library_rmsnorm_residual,
)
SWIGLU = Layer(
    "swiglu",
    swiglu.swiglu,
    swiglu.swiglu_reference,
    lambda rows, width: [(1, rows, 2 * width)],
    (3, 5),
    lambda rows, width: (1, rows, width),
)
GUIDED_HIDDEN = Layer(
    "guided_hidden",
    _last(guided_hidden.guided_hidden, GUIDANCE_SCALE),
    _last(guided_hidden.guided_hidden_reference, GUIDANCE_SCALE),
    lambda rows, width: [_images(rows, width)] * 2,
    (3, 3),
    _images,
)
LAYERNORM = Layer(
    "layernorm",
    _last(layernorm.layernorm, EPS),
    _last(layernorm.layernorm_reference, EPS),
    lambda rows, width: [(rows, width), (width,), (width,)],
    (2, 3),
    _same,
)
LAYERNORM_RESIDUAL = Layer(
    "layernorm_residual",
    _last(layernorm.layernorm_residual, EPS),
    _last(layernorm.layernorm_residual_reference, EPS),
    lambda rows, width: [(rows, width), (rows, width), (width,), (width,)],
    (4, 4),
    _same,
    num_outputs=2,
)
BIAS_GELU = Layer(
    "bias_gelu",
    gelu.bias_gelu,
    gelu.bias_gelu_reference,
    lambda rows, width: [(rows, width), (width,)],
    (2, 3),
    _same,
)
