"""What a report says of variety, beside the rewards that are paid for with it."""

import math
from typing import NamedTuple

from argrpo.run_record import RunRecord


class Change(NamedTuple):
    """A number before training and now."""

    label: str
    first: float
    last: float
    note: str


# Of the evaluations along the run, where they measure it.
_EVALUATED = (
    ("eval/recall", "recall", "of real images; first, last evaluation"),
    ("eval/coverage", "coverage", "of real images; first, last evaluation"),
    (
        "eval/pairwise_distance",
        "distance within a prompt",
        "of features; first, last evaluation",
    ),
)
_PIXELS = (
    "eval/pairwise_pixels",
    "distance within a prompt",
    "of pixels; first, last evaluation",
)
# Of the steps; the first that a run has.
_ENTROPIES = (
    ("entropy/policy", "policy entropy"),
    ("entropy/draw", "entropy of the draws"),
)


def diversity(record: RunRecord) -> list[Change]:
    """Recall, coverage, distance between images of one prompt and entropy, as far as a run has
    measured them."""
    found = [_evaluated(record, *what) for what in _EVALUATED]
    if found[-1] is None:
        found.append(_evaluated(record, *_PIXELS))
    for name, label in _ENTROPIES:
        values = record.finite(name)
        if len(values) > 1:
            note = "nats a token; first and last step"
            found.append(Change(label, values[0], values[-1], note))
            break
    return [change for change in found if change is not None]


def _evaluated(record: RunRecord, name: str, label: str, note: str) -> Change | None:
    values = [row.get(name) for row in record.evaluations]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return Change(label, finite[0], finite[-1], note) if len(finite) > 1 else None
