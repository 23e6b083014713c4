"""What guided_sample and sample_logits refuse, and in which words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from argrpo.kernels.draw import DrawKeys, DrawSettings
from argrpo.kernels.guided_sampling import guided_sample, sample_logits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]


def _arguments() -> Arguments:
    ids = torch.arange(2, device=DEVICE)
    return {
        "cond": torch.zeros(2, 16, device=DEVICE),
        "uncond": torch.zeros(2, 16, device=DEVICE),
        "head_weight": torch.zeros(40, 16, device=DEVICE),
        "keys": DrawKeys(torch.tensor([1], device=DEVICE), ids, ids),
        "settings": DrawSettings(torch.tensor([2.0, 1.0, 0.0, 1.0], device=DEVICE), False),
    }


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda given: {name: change(given[name])}


def _field(name: str, field: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def changed(given: Arguments) -> Arguments:
        return {name: given[name]._replace(**{field: change(getattr(given[name], field))})}

    return changed


WRONG: list[tuple[str, Change]] = [
    (r"cond: expected shape \[\*, \*\], got \[16\]", _tensor("cond", lambda t: t[0])),
    ("cond: expected bfloat16, float16 or float32", _tensor("cond", lambda t: t.double())),
    ("cond: expected a contiguous tensor", _tensor("cond", lambda t: t.t().contiguous().t())),
    ("cond: expected at least 1 row", lambda given: {"cond": given["cond"][:0], "uncond": None}),
    (r"uncond: expected shape \[2, 16\]", _tensor("uncond", lambda t: t[:1])),
    ("uncond: expected float32, got float16", _tensor("uncond", lambda t: t.half())),
    ("uncond: expected a contiguous tensor", _tensor("uncond", lambda t: t.t().contiguous().t())),
    (r"head_weight: expected shape \[\*, 16\]", _tensor("head_weight", lambda t: t[:, :8])),
    ("head_weight: expected float32", _tensor("head_weight", lambda t: t.bfloat16())),
    ("head_weight: expected a contiguous tensor", _tensor("head_weight", lambda t: t[::2])),
    ("vocabulary: expected 1 to 65536", _tensor("head_weight", lambda t: t[:1].repeat(65537, 1))),
    ("vocabulary: expected 1 to 65536 tokens, got 0", _tensor("head_weight", lambda t: t[:0])),
    (r"keys.seed: expected shape \[1\]", _field("keys", "seed", lambda t: t.repeat(2))),
    ("keys.seed: expected int64", _field("keys", "seed", lambda t: t.int())),
    ("keys.seed: expected a tensor on", _field("keys", "seed", lambda t: t.to("meta"))),
    (r"keys.image_ids: expected shape \[2\]", _field("keys", "image_ids", lambda t: t[:1])),
    ("keys.image_ids: expected int64", _field("keys", "image_ids", lambda t: t.int())),
    (r"keys.positions: expected shape \[2\]", _field("keys", "positions", lambda t: t[None])),
    ("keys.positions: expected a contig", _field("keys", "positions", lambda t: t[:1].expand(2))),
    (r"settings.scalars: expected shape \[4\]", _field("settings", "scalars", lambda t: t[:3])),
    ("settings.scalars: expected float32", _field("settings", "scalars", lambda t: t.double())),
    (r"support: expected settings.filtered, got an unfiltered", lambda given: {"support": True}),
]


@pytest.mark.parametrize(("message", "change"), WRONG, ids=[message for message, _ in WRONG])
def test_guided_sample_refuses_by_name(message: str, change: Change) -> None:
    given = _arguments()
    guided_sample(**given)
    with pytest.raises(ValueError, match=message):
        guided_sample(**{**given, **change(given)})


def test_sample_logits_refuses_by_name() -> None:
    given = _arguments()
    keys, settings = given["keys"], given["settings"]
    logits = torch.zeros(2, 40, device=DEVICE)
    with pytest.raises(ValueError, match="logits: expected float32, got float16"):
        sample_logits(logits.half(), keys, settings)
    with pytest.raises(ValueError, match=r"logits: expected shape \[\*, \*\], got \[40\]"):
        sample_logits(logits[0], keys, settings)
    with pytest.raises(ValueError, match="logits: expected a contiguous tensor"):
        sample_logits(logits.t().contiguous().t(), keys, settings)
    with pytest.raises(ValueError, match=r"keys.image_ids: expected shape \[3\], got \[2\]"):
        sample_logits(torch.zeros(3, 40, device=DEVICE), keys, settings)
    with pytest.raises(ValueError, match=r"support: expected settings.filtered"):
        sample_logits(logits, keys, settings, support=True)
