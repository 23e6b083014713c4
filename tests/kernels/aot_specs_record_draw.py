"""What the compile report builds of record_draw: guided rows of B, XL and 3B, and rows of a taming
transformer, which adds learned places; all with kept sets."""

from aot import AotSpec

from argrpo.kernels.record_draw import _WARPS, _record_draw

_WIDTHS = {"b": 768, "xl": 1280, "3b": 3200, "taming": 1536}
_TOKENS, _FLOATS, _BYTES, _HALVES = "*i64:16", "*fp32:16", "*u8:16", "*bf16:16"
_TENSORS = {
    "token_ids_ptr": _TOKENS,
    "logprobs_ptr": _FLOATS,
    "entropies_ptr": _FLOATS,
    "cond_logprobs_ptr": _FLOATS,
    "support_ptr": _BYTES,
    "embeddings_ptr": _HALVES,
    "x_ptr": _HALVES,
    "positions_ptr": _TOKENS,
    "entries_ptr": _TOKENS,
    "log_token_ids_ptr": _TOKENS,
    "log_logprobs_ptr": _FLOATS,
    "log_entropies_ptr": _FLOATS,
    "log_cond_logprobs_ptr": _FLOATS,
    "log_support_ptr": _BYTES,
}
_SCALARS = {
    "first_entry": "i32",
    "num_tokens": "i32:16",
    "num_places": "i32",
    "x_branch_stride": "i32:16",
    "entry_branch_stride": "i32:16",
    "log_row_stride": "i32:16",
    "support_row_stride": "i32:16",
}


def aot_specs() -> list[AotSpec]:
    specs = []
    for model, width in _WIDTHS.items():
        block = 1 << (width - 1).bit_length()
        is_taming = model == "taming"
        sizes = {"WIDTH": width, "BLOCK": block, "BRANCHES": 1 if is_taming else 2}
        places = {"places_ptr": _HALVES} if is_taming else {}
        without = {} if is_taming else {"places_ptr": None}
        kept = {"SUPPORT_BYTES": 2048, "SUPPORT_BLOCK": 2048}
        specs.append(
            AotSpec(
                f"record_draw {model}",
                _record_draw,
                {**_TENSORS, **places, **_SCALARS},
                {**sizes, **kept, **without},
                num_warps=_WARPS,
                num_stages=1,
            )
        )
    return specs
