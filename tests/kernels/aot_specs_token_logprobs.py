"""The row kernels of the head at its real codebook of 16,384 entries, for the compile report."""

from aot import AotSpec

from argrpo.kernels.row_softmax import _DEPTH, _LANES, _WARPS, _row_gradient_bwd, _row_scores_fwd

VOCAB_SIZE = 16384


def aot_specs() -> list[AotSpec]:
    """Scores and gradients of a row, with and without a support and an entropy term."""
    return [
        *(_scores(has_support) for has_support in (False, True)),
        *(
            _gradient(dtype, has_support, has_entropy)
            for dtype in ("bf16", "fp32")
            for has_support in (False, True)
            for has_entropy in (False, True)
        ),
    ]


def _scores(has_support: bool) -> AotSpec:
    constexprs = {"HAS_SUPPORT": has_support, "DEPTH": _DEPTH, "LANES": _LANES}
    signature = {
        "logits_ptr": "*fp32:16",
        "token_ids_ptr": "*i64:16",
        "logprobs_ptr": "*fp32:16",
        "entropies_ptr": "*fp32:16",
        "normalisers_ptr": "*fp32:16",
        "logits_row_stride": "i32:16",
        "support_row_stride": "i32:16",
        "vocab_size": "i32:16",
        "inv_temperature": "fp32",
    }
    return _spec("scores", _row_scores_fwd, signature, constexprs, has_support)


def _gradient(dtype: str, has_support: bool, has_entropy: bool) -> AotSpec:
    constexprs = {
        "HAS_SUPPORT": has_support,
        "HAS_ENTROPY": has_entropy,
        "BLOCK": _DEPTH * _LANES,
    }
    signature = {
        "logits_ptr": "*fp32:16",
        "token_ids_ptr": "*i64:16",
        "normalisers_ptr": "*fp32:16",
        "entropies_ptr": "*fp32:16",
        "dlogprobs_ptr": "*fp32:16",
        "out_ptr": f"*{dtype}:16",
        "row_stride": "i32:16",
        "support_row_stride": "i32:16",
        "vocab_size": "i32:16",
        "tiles": "i32",
        "inv_temperature": "fp32",
    }
    if has_entropy:
        signature["dentropies_ptr"] = "*fp32:16"
    else:
        constexprs["dentropies_ptr"] = None
    case = f"gradient {dtype}" + (" entropy" if has_entropy else "")
    return _spec(case, _row_gradient_bwd, signature, constexprs, has_support)


def _spec(
    case: str,
    kernel: object,
    signature: dict[str, str],
    constexprs: dict[str, object],
    has_support: bool,
) -> AotSpec:
    if has_support:
        signature["support_ptr"] = "*u8:16"
    else:
        constexprs["support_ptr"] = None
    name = f"token_logprobs {case}" + (" support" if has_support else "")
    return AotSpec(name, kernel, signature, constexprs, num_warps=_WARPS, num_stages=1)
