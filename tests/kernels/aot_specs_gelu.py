"""What the compile report builds of gelu: the feed-forward width of a taming transformer."""

from aot import AotSpec

from argrpo.kernels.gelu import _BLOCK, _WARPS, _bias_gelu_bwd, _bias_gelu_fwd

_FORWARD = {"x_ptr": "*bf16:16", "bias_ptr": "*bf16:16", "y_ptr": "*bf16:16"}
_BACKWARD = {
    "dy_ptr": "*bf16:16",
    "x_ptr": "*bf16:16",
    "bias_ptr": "*bf16:16",
    "dx_ptr": "*bf16:16",
    "parts_ptr": "*fp32:16",
    "num_rows": "i32:16",
    "stretch": "i32",
}


def aot_specs() -> list[AotSpec]:
    sizes = {"WIDTH": 6144, "BLOCK": _BLOCK}
    return [
        AotSpec("gelu 6144 forward", _bias_gelu_fwd, _FORWARD, sizes, _WARPS, 1),
        AotSpec("gelu 6144 backward", _bias_gelu_bwd, _BACKWARD, sizes, _WARPS, 3),
    ]
