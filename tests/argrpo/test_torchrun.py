"""The command line under torchrun: one run on two processes, and one message when it ends early."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from small_tokenizer import write_tokenizer

from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.loading import save_policy

JUDGE = """
import time

from argrpo.ranks import own_rank

calls = 0

def fails_late(images, prompts):
    global calls
    calls += 1
    if calls == 3 and own_rank() == 1:
        raise OSError("the judge's disk is gone")
    return images.mean(dim=(1, 2, 3))

def slow(images, prompts):
    print("judging", flush=True)
    time.sleep(0.3)
    return images.mean(dim=(1, 2, 3))
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48, "vocab_size": 32}
    grid = {"image_size": 8, "downsample": 4}
    save_policy(LlamaGen(LlamaGenConfig(**sizes, **grid, num_classes=10)), tmp_path / "policy")
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "judge_of_the_torchrun_test.py").write_text(JUDGE)
    config = {
        "output_dir": "run",
        "policy": {"path": "policy", "num_heads": 2},
        "tokenizer": {"path": "tokenizer"},
        "data": {"names": "digits"},
        "rewards": [{"name": "judge_of_the_torchrun_test:fails_late"}],
        "prompts_per_step": 2,
        "images_per_prompt": 2,
        "num_steps": 5,
        "device": "cpu",
        "output": {"sample_every": 0, "sample_images": 2, "trackers": []},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(config_file: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["--no-python", str(Path(sys.executable).with_name("argrpo"))]
    return [*words, "train", "--config", str(config_file), *more]


@pytest.mark.slow
def test_two_processes_are_one_run_until_one_of_them_fails(config_file: Path) -> None:
    words = command(config_file)
    done = subprocess.run(
        words, cwd=config_file.parent, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1, done.stderr  # torchrun's own, whatever the code of its processes
    assert done.stderr.count("argrpo: rank 1: the judge's disk is gone") == 1
    assert done.stderr.count("argrpo: rank 1 failed: the judge's disk is gone") == 1
    assert "exitcode  : 74" in done.stderr
    # Only the first rank wrote and spoke.
    rows = (config_file.parent / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
    assert done.stdout.count("2 ranks, each draws, scores and learns from 2 images a step") == 1


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_stops_all(config_file: Path) -> None:
    words = ["--num_steps", "400", "--rewards", "judge_of_the_torchrun_test:slow"]
    process = subprocess.Popen(
        command(config_file, *words),
        cwd=config_file.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    count = 5  # calls of two ranks: in the third step
    while count and (line := process.stdout.readline()):
        count -= "judging" in line
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert told.count("argrpo: stopped by SIGTERM, saved in run/checkpoints/step_0000") == 1, told
    latest = config_file.parent / "run" / "checkpoints" / "latest"
    step = int(latest.resolve().name.removeprefix("step_"))
    rows = (config_file.parent / "run" / "metrics.jsonl").read_text().splitlines()
    assert step == len(rows) >= 2
