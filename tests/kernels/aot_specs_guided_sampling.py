"""Drawing a token of B, XL and 3B, for the compile report."""

from typing import Any

from aot import AotSpec

from argrpo.kernels import sample_head
from argrpo.kernels.guidance import _BLOCK, _mix_branches
from argrpo.kernels.sample_head import _merge_tiles, _sample_tiles
from argrpo.kernels.sample_rows import _sample_rows, row_tile

_VOCAB = 16384
_KEYS = dict.fromkeys(("seed_ptr", "image_ids_ptr", "positions_ptr"), "*i64:16")
_WIDTHS = {"b": 768, "xl": 1280, "3b": 3200}


def aot_specs() -> list[AotSpec]:
    """The head product with its draw, the merge of its tiles, the row kernel, the guidance mix."""
    tiles = [
        _tiles_spec(f"{name} {label}", width, guided, cond)
        for name, width in _WIDTHS.items()
        for label, guided, cond in (
            ("plain", False, False),
            ("guided", True, False),
            ("pair", True, True),
        )
    ]
    merges = [_merge_spec("merge", cond=False), _merge_spec("merge pair", cond=True)]
    rows = [
        _rows_spec("unfiltered", _VOCAB),
        _rows_spec("unfiltered pair", _VOCAB, guided=True, cond=True),
        _rows_spec("filtered", _VOCAB, filtered=True),
        _rows_spec("filtered support", _VOCAB, filtered=True, support=True),
        _rows_spec("filtered pair", _VOCAB, True, True, filtered=True, support=True),
        _rows_spec("filtered 1024", 1024, filtered=True, support=True),
        _rows_spec("filtered 65536", 65536, filtered=True, support=True),
    ]
    return [*tiles, *merges, *rows, _mix_spec()]


def _tiles_spec(name: str, width: int, guided: bool, cond: bool) -> AotSpec:
    tensors = dict.fromkeys(("cond_ptr", "uncond_ptr", "weight_ptr"), "*bf16:16")
    floats = dict.fromkeys(("scalars_ptr", "partials_ptr"), "*fp32:16")
    return AotSpec(
        f"guided_sampling head {name}",
        _sample_tiles,
        {**tensors, **floats, **_KEYS, "num_rows": "i32"},
        {
            "D": width,
            "V": _VOCAB,
            "GUIDED": guided,
            "COND": cond,
            "ROWS": sample_head._ROWS,
            "TOKENS": sample_head._TOKENS,
            "DEPTH": sample_head._DEPTH,
        },
        num_warps=sample_head._WARPS,
        num_stages=sample_head._STAGES,
    )


def _merge_spec(name: str, cond: bool) -> AotSpec:
    num_tiles = _VOCAB // sample_head._TOKENS
    floats = dict.fromkeys(("partials_ptr", "scalars_ptr", "scores_ptr"), "*fp32:16")
    return AotSpec(
        f"guided_sampling {name}",
        _merge_tiles,
        {**floats, "token_ids_ptr": "*i64:16"},
        {"V": _VOCAB, "NUM_TILES": num_tiles, "BLOCK": num_tiles, "COND": cond},
        num_warps=1,
        num_stages=1,
    )


def _rows_spec(
    name: str,
    vocab_size: int,
    guided: bool = False,
    cond: bool = False,
    filtered: bool = False,
    support: bool = False,
) -> AotSpec:
    tile = row_tile(vocab_size)
    names = ("logits_ptr", "uncond_ptr", "scalars_ptr", "scores_ptr")
    constants: dict[str, Any] = {"V": vocab_size, "WIDTH": tile.width, "PARTS": tile.parts}
    flags = {"GUIDED": guided, "COND": cond, "FILTERED": filtered, "SUPPORT": support}
    return AotSpec(
        f"guided_sampling rows {name}",
        _sample_rows,
        {
            **dict.fromkeys(names, "*fp32:16"),
            **_KEYS,
            "token_ids_ptr": "*i64:16",
            "support_ptr": "*u8:16" if support else "*i64:16",
        },
        {**constants, **flags},
        num_warps=tile.num_warps,
        num_stages=1,
    )


def _mix_spec() -> AotSpec:
    tensors = dict.fromkeys(("cond_ptr", "uncond_ptr", "out_ptr"), "*bf16:16")
    return AotSpec(
        "guided_sampling mix",
        _mix_branches,
        {**tensors, "scalars_ptr": "*fp32:16", "num_elements": "i32:16"},
        {"BLOCK": _BLOCK},
        num_warps=4,
        num_stages=1,
    )
