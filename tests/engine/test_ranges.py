"""What the engine says that it is doing, to whoever asks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from argrpo.engine.ranges import no_ranges
from argrpo.engine.rollout_engine import RolloutEngine
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.llamagen import LlamaGen
from argrpo.models.loading import load_policy

GOLDEN = Path(__file__).parents[1] / "golden"
GUIDED = SamplingParams(guidance_scale=2.0)
INTERVAL = SamplingParams(guidance_scale=2.0, guidance_interval=20)


@pytest.fixture(scope="module")
def policy() -> LlamaGen:
    """64 tokens: 4 pages of 16, the last token of which is never fed back."""
    loaded = load_policy(GOLDEN / "llamagen_c2i" / "main.pt", image_size=128, num_heads=2)
    return loaded.requires_grad_(False)


class Recorder:
    """Keeps the names of ranges in the order in which they open, and how many are open."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.open = 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.names.append(name)
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1


PAGES = ["decode[1..16]", "decode[17..32]", "decode[33..48]", "decode[49..63]"]
# The 22 guided tokens end inside the second page; the first of them is drawn by the prefix.
GUIDANCE_ENDS = ["decode[1..16]", "decode[17..21]", "decode[22..32]", *PAGES[2:]]
CAPTURES = ["capture", "capture"]  # of eight steps and of one


@pytest.mark.parametrize(
    ("paged", "params", "expected"),
    [
        (True, GUIDED, ["prefill", *CAPTURES, "admit", *PAGES]),
        (True, INTERVAL, ["prefill", *CAPTURES, *CAPTURES, "admit", *GUIDANCE_ENDS]),
        (False, GUIDED, ["prefill", "admit", "decode[1..63]"]),
    ],
    ids=["pages", "pages, guidance ends", "waves"],
)
def test_a_draw_is_told_in_the_order_of_its_work(
    paged: bool, params: SamplingParams, expected: list[str], policy: LlamaGen
) -> None:
    ranges = Recorder()
    engine = RolloutEngine(policy, max_slots=4, page_size=16, paged=paged, ranges=ranges)
    engine.draw(torch.arange(4), params, seed=0)
    assert ranges.names == expected
    assert ranges.open == 0


def test_steps_count_on_when_images_refill_the_slots_of_pages(policy: LlamaGen) -> None:
    ranges = Recorder()
    engine = RolloutEngine(policy, max_slots=2, page_size=16, paged=True, ranges=ranges)
    engine.draw(torch.arange(4), GUIDED, seed=0)
    assert ranges.names[-5:] == [
        "admit", "decode[64..79]", "decode[80..95]", "decode[96..111]", "decode[112..126]",
    ]  # fmt: skip


@pytest.mark.parametrize("paged", [True, False])
def test_no_range_is_open_while_the_caller_holds_a_part(paged: bool, policy: LlamaGen) -> None:
    ranges = Recorder()
    engine = RolloutEngine(policy, max_slots=2, page_size=16, paged=paged, ranges=ranges)
    parts = engine.draw_iter(torch.arange(4), GUIDED, seed=0)
    next(parts)
    assert ranges.open == 0
    parts.close()


def test_without_a_profiler_every_range_is_one_object_that_does_nothing() -> None:
    assert no_ranges("prefill") is no_ranges("decode[1..16]")
    with no_ranges("prefill"), no_ranges("prefill"):  # entered twice at a time, as names nest
        pass
