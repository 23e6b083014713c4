"""What the compile report builds of swiglu: whole blocks (GPT-B) and half a block over (XL)."""

from aot import AotSpec

from argrpo.kernels.swiglu import _BLOCK, _WARPS, _swiglu_bwd, _swiglu_fwd

_WIDTHS = {"b": 2048, "xl": 3584}
_FORWARD = {"gate_up_ptr": "*bf16:16", "y_ptr": "*bf16:16"}
_BACKWARD = {"dy_ptr": "*bf16:16", "gate_up_ptr": "*bf16:16", "dgate_up_ptr": "*bf16:16"}


def aot_specs() -> list[AotSpec]:
    specs = []
    for model, width in _WIDTHS.items():
        sizes = {"WIDTH": width, "BLOCK": _BLOCK}
        specs += [
            AotSpec(f"swiglu {model} forward", _swiglu_fwd, _FORWARD, sizes, _WARPS, 1),
            AotSpec(f"swiglu {model} backward", _swiglu_bwd, _BACKWARD, sizes, _WARPS, 1),
        ]
    return specs
