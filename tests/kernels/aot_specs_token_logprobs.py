"""The row kernels of the head at its real codebook of 16,384 entries, for the compile report."""

from aot import AotSpec

from argrpo.kernels.row_kernels import (
    DEPTH,
    LANES,
    WARPS,
    row_gradient_bwd,
    row_scores_and_gradient,
    row_scores_fwd,
)

_ROW = {
    "logits_ptr": "*fp32:16",
    "token_ids_ptr": "*i64:16",
    "row_stride": "i32:16",
    "support_row_stride": "i32:16",
    "vocab_size": "i32:16",
    "inv_temperature": "fp32",
}
_FP32 = "*fp32:16"
_SCORES = {"logprobs_ptr": _FP32, "entropies_ptr": _FP32, "normalisers_ptr": _FP32}


def aot_specs() -> list[AotSpec]:
    """Scores, gradients and both at once, with and without support, KL and entropy."""
    return [
        _scores(has_support=False),
        _scores(has_support=True),
        *(
            build(dtype, has_support, has_entropy)
            for build in (_gradient, _both)
            for dtype, has_support, has_entropy in (
                ("bf16", False, False),
                ("bf16", False, True),
                ("bf16", True, True),
                ("fp32", False, True),
            )
        ),
    ]


def _scores(has_support: bool) -> AotSpec:
    tile = {"DEPTH": DEPTH, "LANES": LANES}
    return _spec("scores", row_scores_fwd, {**_ROW, **_SCORES}, tile, {"support": has_support})


def _gradient(dtype: str, has_support: bool, has_entropy: bool) -> AotSpec:
    signature = {
        **_ROW,
        "normalisers_ptr": _FP32,
        "entropies_ptr": _FP32,
        "dlogprobs_ptr": _FP32,
        "dentropies_ptr": _FP32,
        "out_ptr": f"*{dtype}:16",
        "tiles": "i32",
    }
    parts = {"entropy": has_entropy, "support": has_support}
    block = {"BLOCK": DEPTH * LANES}
    return _spec(f"gradient {dtype}", row_gradient_bwd, signature, block, parts)


def _both(dtype: str, has_support: bool, has_entropy: bool) -> AotSpec:
    signature = {
        **_ROW,
        **_SCORES,
        "of_logprobs_ptr": _FP32,
        "of_kl_ptr": _FP32,
        "ref_logprobs_ptr": _FP32,
        "of_entropies_ptr": _FP32,
        "out_ptr": f"*{dtype}:16",
    }
    parts = {"entropy": has_entropy, "support": has_support}
    tile = {"HAS_KL": True, "DEPTH": DEPTH, "LANES": LANES}
    return _spec(f"both {dtype}", row_scores_and_gradient, signature, tile, parts)


def _spec(
    case: str,
    kernel: object,
    signature: dict[str, str],
    constexprs: dict[str, object],
    parts: dict[str, bool],
) -> AotSpec:
    """`parts` may be left out: a pointer that is None and a HAS_ flag that is False."""
    pointers = {
        "support": ("support_ptr", "*u8:16"),
        "entropy": ("of_entropies_ptr" if "of_kl_ptr" in signature else "dentropies_ptr", _FP32),
    }
    signature, constexprs = dict(signature), dict(constexprs)
    for part, is_there in parts.items():
        pointer, kind = pointers[part]
        signature.pop(pointer, None)
        constexprs[f"HAS_{part.upper()}"] = is_there
        if is_there:
            signature[pointer] = kind
        else:
            constexprs[pointer] = None
    name = " ".join(["token_logprobs", case, *(part for part in parts if parts[part])])
    return AotSpec(name, kernel, signature, constexprs, num_warps=WARPS, num_stages=1)
