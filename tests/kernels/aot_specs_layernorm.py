"""What the compile report builds of layernorm: taming transformers of width 1024 and 1536."""

from aot import AotSpec

from argrpo.kernels.layernorm import _layernorm_bwd, _layernorm_fwd
from argrpo.kernels.rmsnorm import row_block

_FORWARD = {
    "x_ptr": "*bf16:16",
    "residual_ptr": "*bf16:16",
    "weight_ptr": "*bf16:16",
    "bias_ptr": "*bf16:16",
    "y_ptr": "*bf16:16",
    "total_ptr": "*bf16:16",
    "means_ptr": "*fp32:16",
    "scales_ptr": "*fp32:16",
    "eps": "fp32",
}
_BACKWARD = {
    "dy_ptr": "*bf16:16",
    "dtotal_ptr": "*bf16:16",
    "total_ptr": "*bf16:16",
    "weight_ptr": "*bf16:16",
    "means_ptr": "*fp32:16",
    "scales_ptr": "*fp32:16",
    "dx_ptr": "*bf16:16",
    "dweight_parts_ptr": "*fp32:16",
    "dbias_parts_ptr": "*fp32:16",
    "num_rows": "i32:16",
    "stretch": "i32",
}


def aot_specs() -> list[AotSpec]:
    specs = []
    for width in (1024, 1536):
        sizes = row_block(width)
        num_warps = sizes.pop("num_warps")
        name = f"layernorm {width}"
        specs += [
            AotSpec(f"{name} forward", _layernorm_fwd, _FORWARD, sizes, num_warps, 1),
            AotSpec(f"{name} backward", _layernorm_bwd, _BACKWARD, sizes, num_warps, 2),
        ]
    return specs
