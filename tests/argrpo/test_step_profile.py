"""Traces of single steps: what a trace holds, when it is written, and that a run without one pays
nothing."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_tokenizer import write_tokenizer
from torch import Tensor

from argrpo import nvtx_ranges, step_profile
from argrpo.config import (
    DataConfig,
    OutputConfig,
    PolicyConfig,
    RewardConfig,
    TokenizerConfig,
    TrainConfig,
)
from argrpo.data import Prompt
from argrpo.engine.ranges import no_ranges
from argrpo.engine.sampling_params import SamplingParams
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import save_policy
from argrpo.objective_config import ObjectiveConfig
from argrpo.profile_config import ProfileConfig
from argrpo.run_folder import RunFolder
from argrpo.step_profile import StepProfile
from argrpo.trainer import Trainer

_CPU = torch.device("cpu")
REWARD = f"{__name__}:brightness"


def brightness(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def failing(images: Tensor, prompts: list[Prompt]) -> Tensor:
    raise RuntimeError("no judgement today")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of 4 x 4 tokens and a tokenizer, as small as they can be."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 32, "vocab_size": 32}
    grid = {"image_size": 16, "downsample": 4, "num_classes": 10}
    save_policy(LlamaGen(LlamaGenConfig(**sizes, **grid)), folder / "policy")
    write_tokenizer(folder / "tokenizer")
    return folder


def make_config(models: Path, output_dir: Path, profile: ProfileConfig) -> TrainConfig:
    return TrainConfig(
        output_dir=str(output_dir),
        policy=PolicyConfig(path=str(models / "policy"), num_heads=2),
        tokenizer=TokenizerConfig(path=str(models / "tokenizer")),
        data=DataConfig(names="digits"),
        rewards=[RewardConfig(name=REWARD)],
        prompts_per_step=2,
        images_per_prompt=2,
        num_steps=3,
        micro_batch=2,
        rollout=SamplingParams(guidance_scale=2.0),
        objective=ObjectiveConfig(beta=0.1),
        output=OutputConfig(sample_every=0, sample_images=2, save_every=3, trackers=[]),
        device="cpu",
        profile=profile,
    )


def events_of(path: Path) -> list[dict[str, object]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events: list[dict[str, object]] = json.load(file)["traceEvents"]
    return events


def ranges_of(path: Path) -> Counter[str]:
    """How often each range was open in a trace."""
    return Counter(
        str(event["name"]) for event in events_of(path) if event.get("cat") == "user_annotation"
    )


def test_a_trace_names_every_part_of_the_steps_that_were_asked_for(
    models: Path, tmp_path: Path
) -> None:
    config = make_config(models, tmp_path / "run", ProfileConfig(steps=(2, 3)))
    trainer = Trainer(config, [])
    trainer.train()
    path = tmp_path / "run" / "profile" / "steps_000002_000003.json.gz"
    assert trainer.profile.trace_path == path
    assert [child.name for child in path.parent.iterdir()] == [path.name], "no half-written file"
    expected = {
        "step": 2, "decode": 2,
        "rollout": 4, "reward": 4,  # once for the images, once to see that they are all
        f"reward {REWARD}": 2, "logprob": 2,
        "reference": 2, "update": 2, "optimizer": 2,
        "forward": 4, "backward": 4,  # micro-batches of 2 of 4 images
        "prefill": 3, "admit": 3, "decode[1..15]": 3,  # the draw of the last samples too
        "samples": 1, "checkpoint": 1,  # after the last step
    }  # fmt: skip
    found = ranges_of(path)
    assert {name: found[name] for name in expected} == expected


def test_tracing_changes_no_weight(models: Path, tmp_path: Path) -> None:
    weights = []
    for name, steps in (("off", None), ("on", (1, 3))):
        trainer = Trainer(make_config(models, tmp_path / name, ProfileConfig(steps=steps)), [])
        trainer.train()
        weights.append(trainer.policy.head_weight.detach().clone())
    assert torch.equal(*weights)
    assert not (tmp_path / "off" / "profile").exists()


def test_stacks_and_shapes_come_only_when_asked_for(models: Path, tmp_path: Path) -> None:
    def inputs_and_lines(name: str, profile: ProfileConfig) -> tuple[bool, bool]:
        trainer = Trainer(make_config(models, tmp_path / name, profile), [])
        trainer.train()
        assert trainer.profile.trace_path is not None
        events = events_of(trainer.profile.trace_path)
        has_shapes = any("Input Dims" in event.get("args", {}) for event in events)  # type: ignore[operator]
        return has_shapes, any(event.get("cat") == "python_function" for event in events)

    plain = ProfileConfig(steps=(3, 3))
    assert inputs_and_lines("plain", plain) == (False, False)
    assert inputs_and_lines("full", replace(plain, with_stack=True, with_shapes=True)) == (
        True,
        True,
    )


def test_a_run_that_fails_inside_the_window_ends_the_trace_and_writes_none(
    models: Path, tmp_path: Path
) -> None:
    config = make_config(models, tmp_path / "run", ProfileConfig(steps=(1, 2)))
    config = replace(config, rewards=[RewardConfig(name=f"{__name__}:failing")])
    trainer = Trainer(config, [])
    with pytest.raises(RuntimeError, match="no judgement today"):
        trainer.train()
    assert not (tmp_path / "run" / "profile").exists()
    with torch.profiler.profile():  # a second profiler cannot start while one is running
        pass


def test_a_run_without_a_trace_hands_out_the_ranges_that_do_nothing(
    models: Path, tmp_path: Path
) -> None:
    profile = StepProfile(ProfileConfig(), _CPU, RunFolder(tmp_path))
    assert profile.ranges is no_ranges
    assert profile.engine_ranges is no_ranges
    assert profile.trace_path is None


def test_a_run_without_a_trace_imports_neither_nvtx_nor_the_ranges_of_nvtx(
    models: Path, tmp_path: Path
) -> None:
    config = make_config(models, tmp_path / "run", ProfileConfig())
    code = f"""
import sys
from argrpo.config import *
from argrpo.data import *
from argrpo.engine.sampling_params import *
from argrpo.entropy_control import *
from argrpo.eval_config import *
from argrpo.learner_config import *
from argrpo.objective_config import *
from argrpo.profile_config import *
from argrpo.schedules import *
from argrpo.text_config import *
from argrpo.trainer import Trainer
sys.modules["judge"] = type(sys)("judge")
sys.modules["judge"].brightness = lambda images, prompts: images.mean(dim=(1, 2, 3))
Trainer({replace(config, rewards=[RewardConfig(name="judge:brightness")])!r}, []).train()
print([name for name in sys.modules if name.split(".")[0] == "nvtx"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


class FakeNvtx:
    """Stands for the package: keeps what was annotated."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, int, str]] = []

    @contextmanager
    def annotate(self, message: str, color: int, domain: str) -> Iterator[None]:
        self.opened.append((message, color, domain))
        yield


def test_nsys_gets_ranges_in_a_domain_a_layer_and_a_capture_of_the_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []
    nvtx = FakeNvtx()
    monkeypatch.setitem(sys.modules, "nvtx", nvtx)
    cuda = SimpleNamespace(
        synchronize=lambda device: calls.append("wait"),
        profiler=SimpleNamespace(
            start=lambda: calls.append("start"), stop=lambda: calls.append("stop")
        ),
    )
    monkeypatch.setattr(step_profile.torch, "cuda", cuda)
    config = ProfileConfig(steps=(2, 3), tool="nsys")
    profile = StepProfile(config, torch.device("cuda"), RunFolder(tmp_path))
    for step in range(4):
        with profile.tracing(step), profile.ranges("step"):
            calls.append(f"step {step + 1}")
            with profile.engine_ranges("decode[1..63]"):
                pass
    assert calls == ["step 1", "wait", "start", "step 2", "step 3", "wait", "stop", "step 4"]
    step = ("step", nvtx_ranges.COLORS["step"], "argrpo")
    decode = ("decode[1..63]", nvtx_ranges.COLORS["decode"], "argrpo.engine")
    assert nvtx.opened == [step, decode, step, decode], "nothing outside the two steps"
    assert list(tmp_path.iterdir()) == []


def test_the_real_nvtx_takes_our_ranges() -> None:
    ranges = nvtx_ranges.nvtx_ranges("argrpo.tests")
    with ranges("step"), ranges("reward clip"):
        pass


def test_nsys_is_refused_on_a_cpu(models: Path, tmp_path: Path) -> None:
    config = make_config(models, tmp_path / "run", ProfileConfig(steps=(1, 1), tool="nsys"))
    with pytest.raises(ValueError, match=r"profile\.tool: expected torch on a cpu, got nsys"):
        Trainer(config, [])
    assert not (tmp_path / "run").exists(), "an empty folder was left behind"


def test_nsys_without_the_package_nvtx_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    config = ProfileConfig(steps=(1, 1), tool="nsys")
    with pytest.raises(ValueError, match=r"expected the package nvtx .* pip install nvtx"):
        StepProfile(config, torch.device("cuda"), RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((0, 2), r"profile\.steps: expected a first step of at least 1 .* got \[0, 2\]"),
        ((3, 2), r"profile\.steps: expected .* a last one not before it, got \[3, 2\]"),
        ((2, 4), r"profile\.steps: expected steps of 1 to num_steps 3, got \[2, 4\]"),
    ],
)
def test_steps_that_the_run_does_not_have_are_refused(
    steps: tuple[int, int], message: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(models, tmp_path, ProfileConfig(steps=steps))


@pytest.mark.parametrize(
    ("name", "like"), [("decode[1..64]", "decode"), ("reward clip", "reward"), ("step", "step")]
)
def test_a_range_has_the_colour_of_its_first_word(name: str, like: str) -> None:
    assert nvtx_ranges.color_of(name) == nvtx_ranges.COLORS[like]
    assert nvtx_ranges.color_of(f"un{name}") not in nvtx_ranges.COLORS.values()
