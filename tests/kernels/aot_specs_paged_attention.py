"""What the compile report builds of paged_attention: the shapes of LlamaGen, and the odd ones.

GPT-B to XXL (12 to 24 heads of 64) compile to one kernel, because the number of heads is the grid.
"""

import math

from aot import AotSpec

from argrpo.kernels.paged_decode import _WARPS, _paged_decode_fwd, tile_shape

_POINTERS = {
    "q_ptr": "*bf16:16",
    "k_ptr": "*bf16:16",
    "v_ptr": "*bf16:16",
    "out_ptr": "*bf16:16",
    "positions_ptr": "*i64:16",
    "key_pages_ptr": "*bf16:16",
    "value_pages_ptr": "*bf16:16",
    "block_table_ptr": "*i32:16",
}
_ROTARY = {"rotary_ptr": "*fp32:16"}
_PREFIX = {"value_sums_ptr": "*fp32:16", "counts_ptr": "*fp32:16", "prefix_index_ptr": "*i64:16"}


def aot_specs() -> list[AotSpec]:
    return [
        _spec("xl page 64", head_dim=64, optional=_ROTARY | _PREFIX),
        _spec("xl ordinary prefix", head_dim=64, optional=_ROTARY),
        _spec("3b page 64", head_dim=100, optional=_ROTARY | _PREFIX),
        _spec("3b page 128", head_dim=100, page_size=128, optional=_ROTARY | _PREFIX),
        _spec("taming page 64", head_dim=104, optional={}),
        _spec("head 128 group 4 page 16", head_dim=128, page_size=16, group=4, optional=_ROTARY),
    ]


def _spec(
    name: str, head_dim: int, optional: dict[str, str], page_size: int = 64, group: int = 1
) -> AotSpec:
    # Rows of a packed product are whole multiples of 16; heads of 100 and 104 are not.
    head_stride = "i32" if math.gcd(head_dim, 16) < 16 else "i32:16"
    strides = {f"{side}_row_stride": "i32:16" for side in "qkv"}
    strides |= {f"{side}_head_stride": head_stride for side in "qkv"}
    signature = _POINTERS | optional | strides
    signature |= {"score_scale": "fp32", "table_row_stride": "i32"}
    absent = dict.fromkeys((_ROTARY | _PREFIX).keys() - optional.keys())
    constexprs = tile_shape(head_dim, page_size, 2) | {"GROUP": group} | absent
    return AotSpec(
        f"paged_attention {name}", _paged_decode_fwd, signature, constexprs, _WARPS, num_stages=3
    )
