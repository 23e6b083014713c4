"""Runs of many steps: the same bits again, and no memory that grows; and settings by chance."""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from argrpo.config import TrainConfig
from argrpo.config_files import parse_config
from argrpo.data import Prompt
from argrpo.objective_config import ObjectiveConfig
from argrpo.output_config import OutputConfig
from argrpo.tensor_file import record_of, write_tensors
from argrpo.trainer import Trainer

SOAK_STEPS = 2000


def brightness(images: Tensor, prompts: list[Prompt]) -> Tensor:
    return images.mean(dim=(1, 2, 3)) * 100


def made_config(models: Path, folder: Path, **settings: Any) -> TrainConfig:
    words = f"""--policy.path {models}/policy --tokenizer.path {models}/tokenizer
        --policy.num_heads 2 --output_dir {folder} --data.names digits --num_steps 3
        --prompts_per_step 1 --images_per_prompt 2 --micro_batch 2 --objective.beta 0.1
        --optimizer.learning_rate.peak 1e-3 --output.sample_every 0 --output.sample_images 1
        --output.trackers [] --device cpu""".split()
    words += ["--rewards", json.dumps([{"name": f"{__name__}:brightness"}])]
    return replace(parse_config(TrainConfig, words, command="train", lists={}), **settings)


def test_the_same_command_gives_the_same_weights_after_20_steps(
    tiny_models: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        torch.rand(len(name) + hash(name) % 7)  # whatever was drawn before the run
        Trainer(made_config(tiny_models, tmp_path / name, num_steps=20)).train()
    for file in ("model.safetensors", "training.safetensors"):
        one, two = (
            record_of(tmp_path / name / "checkpoints" / "step_000020" / file)
            for name in ("one", "two")
        )
        assert one == two, file


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


@pytest.mark.slow
def test_two_thousand_steps_take_no_more_memory_than_two_hundred(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[int, int]] = []
    original = Trainer._log

    def log(self: Trainer, step: int, outcome: Any) -> None:
        original(self, step, outcome)
        if step in (200, SOAK_STEPS):
            gc.collect()
            tensors = sum(isinstance(item, Tensor) for item in gc.get_objects())
            held.append((resident_bytes(), tensors))

    monkeypatch.setattr(Trainer, "_log", log)
    output = OutputConfig(sample_every=0, sample_images=1, save_every=500, keep_last=1, trackers=[])
    Trainer(
        made_config(
            tiny_models,
            tmp_path,
            num_steps=SOAK_STEPS,
            output=output,
            objective=ObjectiveConfig(beta=0.0),
        )
    ).train()
    (early, early_tensors), (late, late_tensors) = held
    assert late_tensors <= early_tensors + 5  # the last step's own may differ by a few
    # 9 KB a step would be 16 MB. The allocator's arenas, and the copy of a checkpoint that is
    # under way, move by a few.
    assert late - early < 16 * 2**20
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == SOAK_STEPS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Path:
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    Trainer(made_config(tiny_models, folder)).train()
    return folder


def test_a_state_that_does_not_fit_is_refused_whole(
    saved: Path, tiny_models: Path, tmp_path: Path
) -> None:
    names = sorted(load_file(saved / "checkpoints" / "latest" / "training.safetensors"))

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def refused(data: st.DataObject) -> None:
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder, symlinks=True)
        path = folder / "checkpoints" / "step_000003"
        tensors = load_file(path / "training.safetensors")
        name = data.draw(st.sampled_from(names))
        value = tensors.pop(name)
        match data.draw(st.sampled_from(["drop", "rename", "shape", "dtype"])):
            case "rename":
                tensors[f"{name}x"] = value
            case "shape":
                flat = value.flatten()
                tensors[name] = torch.cat([flat, flat.new_zeros(len(flat) + 3)])
            case "dtype":
                other = torch.float64 if value.dtype != torch.float64 else torch.int64
                tensors[name] = value.to(other)
        (path / "training.safetensors").unlink()
        record = write_tensors(path / "training.safetensors", tensors)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["training.safetensors"] = record._asdict()
        (path / "manifest.json").write_text(json.dumps(manifest))
        config = made_config(tiny_models, folder, num_steps=4, resume="auto")
        with pytest.raises(ValueError, match="resume: "):
            Trainer(config).train()
        assert not (folder / ".lock").exists()

    refused()


_ANY = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-3, 3), max_size=2), st.dictionaries(st.text(max_size=3), st.none()),
)  # fmt: skip
_NAMES = [
    "num_steps", "prompts_per_step", "images_per_prompt", "inner_epochs", "minibatches", "seed",
    "micro_batch", "weight_ema", "max_slots", "kv_bytes", "rollout", "objective", "optimizer",
    "output", "fault", "rewards", "resume", "policy", "tokenizer", "eval", "entropy", "profile",
    "rollout.top_p", "objective.beta", "optimizer.betas", "optimizer.learning_rate.peak",
    "output.keep_last", "output.save_every", "fault.watchdog_s", "data.classes", "no_such_setting",
]  # fmt: skip


@settings(max_examples=75, deadline=None)
@given(st.dictionaries(st.sampled_from(_NAMES), _ANY, min_size=1, max_size=3))
def test_any_settings_make_a_run_or_a_refusal_that_is_one_line(values: dict[str, Any]) -> None:
    words = ["--config", "digits.yaml"]
    words += [f"--{name}={json.dumps(value)}" for name, value in values.items()]
    try:
        config = parse_config(TrainConfig, words, command="argrpo train", lists={})
    except (ValueError, FileNotFoundError) as error:
        assert str(error) and "\n" not in str(error)
        return
    assert config.images_per_step >= 2 and config.num_steps >= 1
    assert config.images_per_step % config.minibatches == 0
