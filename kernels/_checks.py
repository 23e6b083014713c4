"""What every op checks at its border, and whether it may launch a Triton kernel."""

import torch
import triton
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    *,
    contiguous: bool = True,
) -> None:
    """Refuse a tensor that is not what the op was written for.

    Args:
        name: the argument's name as the caller knows it; every message starts with it.
        tensor: the argument.
        shape: the sizes wanted, None where any size will do.
        dtypes: the dtypes accepted.
        contiguous: whether rows must follow each other without gaps (row-major).

    Raises:
        ValueError: the shape, the dtype or the layout differs.
    """
    fits = tensor.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected {_listed(dtypes)}, got {_short(tensor.dtype)}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, got shape {list(tensor.shape)} with strides "
            f"{list(tensor.stride())}; call .contiguous() first"
        )


def uses_triton(tensor: Tensor) -> bool:
    """Whether an op runs its kernel on this tensor: on a GPU, or in Triton's interpreter.

    The interpreter is switched on by TRITON_INTERPRET=1 in the environment, before any kernel is
    imported; it is the one setting that a package reads from there outside the command line.
    """
    return tensor.is_cuda or bool(triton.knobs.runtime.interpret)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    *most, last = (_short(dtype) for dtype in dtypes)
    return f"{', '.join(most)} or {last}" if most else last
