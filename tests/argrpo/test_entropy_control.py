"""What a step pays for entropy."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from argrpo.entropy_control import (
    EntropyConfig,
    EntropyControl,
    loofid_coefficient,
    make_entropy_control,
)

_VOCAB = 64
_LARGEST = math.log(_VOCAB)


def _control(num_steps: int = 600, **settings: object) -> EntropyControl:
    return make_entropy_control(
        EntropyConfig(**settings), constant=0.25, num_steps=num_steps, vocab_size=_VOCAB
    )


def test_the_released_rule_agrees_with_the_golden_case(golden: Path) -> None:
    case = load_file(golden / "loofid_recipe" / "entropy_coefficient.safetensors")
    record = json.loads((golden / "loofid_recipe" / "case.json").read_text())
    config = EntropyConfig(control="loofid")  # its defaults are the released values
    rtol = record["tolerance"]["entropy coefficient"]["rtol"]
    shares = [min(max(share, 0.0), 1.0) for share in case["normalised_entropy"].tolist()]
    for row, step in enumerate(case["step"].tolist()):
        progress = min(max(step / 600, 0.0), 1.0)
        found = [loofid_coefficient(progress, share, config) for share in shares]
        assert found == pytest.approx(case["coefficient"][row].tolist(), rel=rtol), step
    plateau = [loofid_coefficient(0.5, share, config) for share in shares]
    assert plateau == pytest.approx(case["coefficient_without_progress"].tolist(), rel=rtol)


def test_loofid_follows_its_schedule_until_it_has_heard_of_an_entropy() -> None:
    control = _control(control="loofid", min_coef=0.0)
    found = [control.coefficient(step) for step in (0, 15, 30, 300, 555, 600, 700)]
    wanted = [0.0, 1.1e-3, 2.2e-3, 2.2e-3, 1.1e-3, 0.0, 0.0]
    assert found == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("share", "factor"), [(0.78, 1.0), (0.766, 1.0), (0.68, math.exp(0.3)), (0.88, math.exp(-0.3))]
)
def test_loofid_leans_against_what_it_heard_last(share: float, factor: float) -> None:
    control = _control(control="loofid")
    control.observe(0.1 * _LARGEST)
    control.observe(share * _LARGEST)
    assert control.coefficient(300) == pytest.approx(2.2e-3 * factor, rel=1e-12)


def test_loofid_stays_within_its_bounds() -> None:
    control = _control(control="loofid", gain=30.0)
    control.observe(0.0)
    assert control.coefficient(300) == 4e-3
    control.observe(2 * _LARGEST)
    assert control.coefficient(300) == 7e-5


def test_a_schedule_without_rise_or_fall_is_flat() -> None:
    control = _control(control="loofid", warmup_fraction=0.0, decay_from=1.0)
    assert {control.coefficient(step) for step in (0, 1, 599, 600)} == {2.2e-3}


def test_the_entropy_of_the_same_step_counts_where_it_is_known() -> None:
    entropy = 0.5 * math.log(256)
    early, late = (
        make_entropy_control(
            EntropyConfig(control="loofid"), constant=0.0, num_steps=100, vocab_size=256
        )
        for _ in range(2)
    )
    late.observe(entropy)
    assert early.coefficient_at(20, entropy) == late.coefficient(20) != early.coefficient(20)


def test_target_settles_where_the_entropy_is_on_target() -> None:
    # A policy whose entropy is proportional to what it is paid: on target at 1.5e-3.
    control = _control(control="target", target=0.75, rate=1e-3)
    for step in range(60):
        control.observe(control.coefficient(step) * 500 * _LARGEST)
    # the error halves at each step: 2 ** -60
    assert control.coefficient(60) == pytest.approx(1.5e-3, rel=1e-9)


def test_target_forgets_how_long_it_was_at_a_bound() -> None:
    control = _control(control="target", target=0.5, rate=1e-3)
    for _ in range(1000):
        control.observe(0.1 * _LARGEST)
    assert control.coefficient(1000) == 4e-3
    control.observe(0.9 * _LARGEST)
    assert control.coefficient(1001) == pytest.approx(4e-3 - 0.4e-3)


def test_constant_is_deaf() -> None:
    control = _control()
    assert control.coefficient(0) == 0.25
    control.observe(0.0)
    assert control.coefficient(599) == 0.25
    assert control.state_dict() == {}


@pytest.mark.parametrize("kind", ["constant", "loofid", "target"])
@pytest.mark.parametrize("has_heard", [False, True])
def test_a_state_taken_up_again_goes_on_as_before(kind: str, has_heard: bool) -> None:
    control, other = _control(control=kind), _control(control=kind)
    if has_heard:
        control.observe(0.4 * _LARGEST)
    other.load_state_dict(control.state_dict())
    assert other.coefficient(300) == control.coefficient(300)
    for one in (control, other):
        one.observe(0.9 * _LARGEST)
    assert other.coefficient(301) == control.coefficient(301)


@pytest.mark.parametrize("kind", ["constant", "loofid", "target"])
@pytest.mark.parametrize("entropy", [math.nan, math.inf])
def test_an_entropy_that_is_no_number_is_refused(kind: str, entropy: float) -> None:
    with pytest.raises(ValueError, match="entropy: expected a finite number of nats, got"):
        _control(control=kind).observe(entropy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"target": t}, r"entropy\.target: expected a share of ln V in \(0, 1\)") for t in
          (0.0, 1.0, -0.1, 7.5, math.nan)),
        ({"control": "pid"}, r"entropy\.control: expected constant, loofid or target, got 'pid'"),
        ({"min_coef": -1e-5}, r"entropy\.min_coef: expected a finite number of at least 0"),
        ({"max_coef": 1e-5}, r"entropy\.max_coef: expected a finite number of at least 7e-05"),
        ({"max_coef": math.inf}, r"entropy\.max_coef: expected a finite number"),
        ({"dead_band": -1.0}, r"entropy\.dead_band: expected a finite number of at least 0"),
        ({"gain": math.nan}, r"entropy\.gain: expected a finite number of at least 0"),
        ({"base_coef": 0.0}, r"entropy\.base_coef: expected a number above 0, got 0"),
        ({"rate": -1.0}, r"entropy\.rate: expected a number above 0, got -1"),
        ({"warmup_fraction": -0.1}, r"entropy\.warmup_fraction: expected a finite number of at"),
        ({"decay_from": 0.01}, r"entropy\.decay_from: expected a finite number of at least 0\.05"),
        ({"decay_from": 1.5}, r"entropy\.decay_from: expected at most 1, got 1\.5"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EntropyConfig(**settings)
