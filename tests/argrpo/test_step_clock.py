"""The clock of a step."""

import time

import pytest
import torch

from argrpo.step_clock import PHASES, StepClock


def test_phases_add_up_to_the_step() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.start_step()
    for phase in PHASES:
        with clock.phase(phase):
            time.sleep(0.01)
    with clock.phase("rollout"):
        time.sleep(0.02)
    report = clock.finish_step(num_images=6, num_tokens=96)
    parts = sum(report[f"time/{phase}"] for phase in PHASES)
    # Nothing runs between the phases here; 2 % is what a run has to keep to.
    assert parts == pytest.approx(report["step_time"], rel=0.02)
    assert report["time/rollout"] >= 0.03
    assert report["images_per_second"] == pytest.approx(6 / report["step_time"])


def test_a_phase_that_fails_is_still_counted() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.start_step()
    with pytest.raises(RuntimeError), clock.phase("reward"):
        time.sleep(0.01)
        raise RuntimeError
    assert clock.finish_step(1, 1)["time/reward"] >= 0.01
