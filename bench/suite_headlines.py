"""What a suite says of its rows at the end: a line for each result of this commit.

Ours, and of rollouts and steps also those of their peers, which say how they are made. A kernel is
told with a cold cache where there is such a row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from result_rows import rows_in

_OURS = "argrpo"
# Of judges, pixels and steps with a server, where two ways of ours are compared: the one told.
_FAST = ("batched", "tensor", "with_server", "drawn_ahead")


def headlines(results: Path, device: str, commit: str) -> list[str]:
    """Lines in the order of the files; of a result that was measured again, the last one.

    Args:
        results: folder of the rows.
        device: in the names of its files: cpu or gpu.
        commit: whose rows are told.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted(results.glob(f"*_{device}.jsonl")):
        for row in rows_in(path):
            if row["commit"] != commit or not _is_told(row):
                continue
            name = _name(row)
            if name not in found or row.get("cache") != "hot":
                found[name] = row
    return [f"{name}: {', '.join(_figures(row))}" for name, row in found.items()]


def _is_told(row: Mapping[str, Any]) -> bool:
    if row["bench"] == "rewards":
        return row["contender"] in _FAST
    return row.get("contender", _OURS) == _OURS or "how" in row


def _name(row: Mapping[str, Any]) -> str:
    """What was measured: no two results of a run have one name."""
    contender = row.get("contender", _OURS)
    peer = f", {contender}" if contender != _OURS else ""
    if row["bench"] == "rewards":
        judge = f" {row['judge']}" if "judge" in row else ""
        return f"{row['family']}{judge}, {row['images']} images{peer}"
    if row["bench"] == "decode":
        return f"{row['case']}, {row['dtype']}"
    if "case" in row:
        return f"{row['case']}{peer}"
    text = f", {row['text_tokens']} text tokens" if row.get("text_tokens") else ""
    layout = f", {row['layout']}" if "layout" in row else ""
    return (
        f"{row['bench']} {row['model']} {row['image_size']} px, {row['images']} images, "
        f"guidance {row['guidance_scale']:g}{text}{layout}{peer}"
    )


def _figures(row: Mapping[str, Any]) -> list[str]:
    told = [f"{row['images_per_s']:.2f} images/s"] if "images_per_s" in row else []
    if "p50_us" in row:
        told.append(f"{row['p50_us']:.1f} us {row['cache']}")
    elif not told:
        told.append(f"{row['p50_ms']:.1f} ms")
    if "percent_of_limit" in row:
        told.append(f"{row['percent_of_limit']:.0f} % of limit")
    if row["bench"] == "kernels" and "over_floor" in row:
        told.append(f"{row['over_floor']:.2f} x floor")
    if row["bench"] == "rewards":
        told += [
            f"{value:.2f} x {name.removeprefix('over_').replace('_', ' ')}"
            for name, value in row.items()
            if name.startswith("over_")
        ]
    elif "how" in row and row.get("over_ours", 1) != 1:
        told.append(f"{row['over_ours']:.2f} x our time")
    return told
