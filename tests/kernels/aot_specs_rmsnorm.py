"""What the compile report builds of rmsnorm: the widths of GPT-B, XL and 3B."""

from aot import AotSpec

from argrpo.kernels.rmsnorm import _rmsnorm_bwd, _rmsnorm_fwd, row_block

_WIDTHS = {"b": 768, "xl": 1280, "3b": 3200}
_FORWARD = {
    "x_ptr": "*bf16:16",
    "residual_ptr": "*bf16:16",
    "weight_ptr": "*bf16:16",
    "y_ptr": "*bf16:16",
    "total_ptr": "*bf16:16",
    "scales_ptr": "*fp32:16",
    "eps": "fp32",
}
_BACKWARD = {
    "dy_ptr": "*bf16:16",
    "dtotal_ptr": "*bf16:16",
    "total_ptr": "*bf16:16",
    "weight_ptr": "*bf16:16",
    "scales_ptr": "*fp32:16",
    "dx_ptr": "*bf16:16",
    "parts_ptr": "*fp32:16",
    "num_rows": "i32:16",
    "stretch": "i32",
}


def aot_specs() -> list[AotSpec]:
    specs = []
    for model, width in _WIDTHS.items():
        sizes = row_block(width)
        num_warps = sizes.pop("num_warps")
        specs += [
            AotSpec(f"rmsnorm {model} forward", _rmsnorm_fwd, _FORWARD, sizes, num_warps, 1),
            AotSpec(f"rmsnorm {model} backward", _rmsnorm_bwd, _BACKWARD, sizes, num_warps, 2),
        ]
    return specs
