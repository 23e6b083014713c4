"""The guidance mix of 64 images of 256 tokens of XL, for the compile report."""

from aot import AotSpec

from argrpo.kernels.guided_hidden import (
    _BLOCK,
    _WARPS,
    _guided_hidden_bwd,
    _guided_hidden_fwd,
)


def aot_specs() -> list[AotSpec]:
    """Forward and backward in bf16."""
    tensors = {
        _guided_hidden_fwd: ("cond_ptr", "uncond_ptr", "out_ptr"),
        _guided_hidden_bwd: ("dout_ptr", "dcond_ptr", "duncond_ptr"),
    }
    scalars = {"scale": "fp32", "size": "i32:16", "num_guided": "i32:16", "tiles": "i32:16"}
    return [
        AotSpec(
            name,
            kernel,
            {**dict.fromkeys(tensors[kernel], "*bf16:16"), **scalars},
            {"BLOCK": _BLOCK},
            num_warps=_WARPS,
            num_stages=1,
        )
        for name, kernel in (
            ("guided_hidden forward", _guided_hidden_fwd),
            ("guided_hidden backward", _guided_hidden_bwd),
        )
    ]
