"""The scripts' measurements as pytest-benchmark tests: `pytest bench/ --benchmark-only`.

pytest-benchmark times by the wall clock and writes the JSON that `--benchmark-compare` reads; what
the device says, and how near a call came to its limit, stands in `extra_info` beside it. Groups are
operations; those of single kernels stand in bench_kernels.py. On a CPU the sizes are small: scripts
are for figures, these tests for seeing them move.
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import bench_decode
import bench_loo_fid
import bench_slots
import bench_step
import pytest
import torch
from bench_trunk import Trunk
from rollout_contenders import Case, Floor, OurEngine
from rollout_peers import PEERS
from roofline import least_step_us
from step_case import StepCase
from step_ours import OurStep
from timing import Call, Ceilings, ceilings_of, clock_of, measure

ROUNDS = 3
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
MODEL, IMAGES, IMAGE_SIZE = ("XL", 64, 256) if ON_GPU else ("small", 4, 128)


@cache
def _ceilings() -> Ceilings:
    return ceilings_of(DEVICE, DTYPE)


def _case(guidance_scale: float = 2.0) -> Case:
    return Case(
        model=MODEL,
        image_size=IMAGE_SIZE,
        images=IMAGES,
        guidance_scale=guidance_scale,
        dtype=DTYPE,
        device=DEVICE,
    )


def _record(
    benchmark: Any, group: str, call: Call, limit_us: float | None, facts: Mapping[str, Any]
) -> None:
    """Time a call; `limit_us` is the least that it can take, where there is such a figure."""
    timing = measure([call], clock_of(DEVICE), warmup=1, samples=ROUNDS)
    benchmark.group = group
    benchmark.extra_info["device_us"] = round(timing.p50_us, 3)
    if limit_us is not None:
        benchmark.extra_info["percent_of_limit"] = round(100 * limit_us / timing.p50_us, 1)
    benchmark.extra_info |= dict(facts)

    def wait_for_call() -> None:
        call()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(wait_for_call, rounds=ROUNDS, warmup_rounds=1)


# On a CPU the compiler of the static cache takes longer than all the rest.
@pytest.mark.parametrize("name", ["floor", "argrpo", "hf_static", *["static_cache"] * ON_GPU])
def test_rollout_step(benchmark: Any, name: str) -> None:
    """The last step of a draw: the longest keys."""
    case = _case()
    policy = case.policy()
    if name == "floor":
        contender: Any = Floor(case, policy)
    else:
        contender = OurEngine(case, policy) if name == "argrpo" else PEERS[name](case, policy, None)
        contender.prepare()
    position = case.num_tokens - 1
    facts = {"contender": name, "model": MODEL, "images": IMAGES, "position": position}
    limit_us = least_step_us(case.step_sizes, case.num_tokens, _ceilings())
    _record(benchmark, "rollout step", partial(contender.step, position), limit_us, facts)


@pytest.mark.parametrize("name", ["argrpo", "argrpo checkpointed"])
def test_trunk(benchmark: Any, name: str) -> None:
    """Forward and backward of the training trunk."""
    trunk = Trunk.of(_case(guidance_scale=1.0))
    hidden = trunk.ours if name == "argrpo" else trunk.checkpointed
    limit_us = trunk.flops / _ceilings().flops_per_second * 1e6
    facts = {"contender": name, "model": MODEL, "images": IMAGES}
    _record(benchmark, "trunk", trunk.both_ways(hidden), limit_us, facts)


@pytest.mark.parametrize("index", [0, 1], ids=["lockstep", "cohorts"])
def test_slots(benchmark: Any, index: int) -> None:
    """Four times as many images as the slots that fit in lockstep."""
    case = _case()
    layouts, _budget = bench_slots.layouts_of(
        case.policy(), max(IMAGES // 4, 2), 64 if ON_GPU else 16
    )
    facts = layouts[index].facts(IMAGES)
    _record(benchmark, "slots", partial(layouts[index].draw, case), None, facts)


@pytest.mark.parametrize("name", ["argrpo", "plain"])
def test_step(benchmark: Any, name: str) -> None:
    """One whole training step; its phases stand in `extra_info`, in ms."""
    sizes = ("VQ-16", "clip") if ON_GPU else ("tiny", "tiny")
    case = StepCase(draw=_case(), group=2, micro_batch=4, judges=(sizes[1],), tokenizer=sizes[0])
    policy, tokenizer, judges = case.draw.policy(), case.make_tokenizer(), case.make_judges()
    if name == "plain":
        step: Any = bench_step.make_peer(name, case, policy, tokenizer, judges, None)
    else:
        step = OurStep(case, policy.requires_grad_(True), tokenizer, judges)
    seconds = step.run(seed=0)
    facts = {
        "contender": name,
        "model": MODEL,
        "images": IMAGES,
        **{f"{phase}_ms": seconds[f"time/{phase}"] * 1e3 for phase in bench_step.PHASES},
    }
    _record(benchmark, "training step", partial(step.run, 1), None, facts)


def test_decode(benchmark: Any) -> None:
    """A batch of images from tokens to pixels."""
    case = bench_decode.DecodeCase(IMAGE_SIZE, IMAGES, DEVICE, "VQ-16" if ON_GPU else "tiny")
    dtype = "bfloat16" if ON_GPU else "float32"
    decode = bench_decode.contenders(case, [dtype], compiled=False)["argrpo", dtype]
    limit_us = case.flops() / _ceilings().flops_per_second * 1e6
    _record(benchmark, "decode", decode, limit_us, {"images": IMAGES, "dtype": dtype})


@pytest.mark.parametrize("name", ["tensor", "pillow"])
def test_tower_pixels(benchmark: Any, name: str) -> None:
    """Images to what a judge's tower takes."""
    pytest.importorskip("torchvision")
    import bench_rewards  # half of the time that all these imports take

    images = bench_rewards.smooth_images(IMAGES, 256, DEVICE)
    call = bench_rewards.pixel_calls(images, bench_rewards.TOWER_SIZE)[name]
    _record(benchmark, "tower pixels", call, None, {"images": IMAGES, "contender": name})


@pytest.mark.parametrize("kind", ["batch", "carried"])
def test_leave_one_out(benchmark: Any, kind: str) -> None:
    """Frechet distances without each image."""
    case = bench_loo_fid.LooCase(kind, 32, 256, DEVICE)
    inputs = bench_loo_fid.Inputs(case)
    bench_loo_fid.check_same(inputs, 2)
    facts = {"images": case.images, "features": case.features}
    _record(benchmark, "loo_fid", inputs.ours, None, facts)
