"""`argrpo doctor`: what is installed, what will be used, and why."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from argrpo import doctor
from argrpo.cli import main


def test_doctor_says_what_is_there_and_what_will_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--cache_dir", str(tmp_path / "not" / "there")]) == 0
    text = capsys.readouterr().out
    for words in ("torch", "triton", "GPU", "memory", "GB free", "argrpo[track]", "engine"):
        assert words in text
    assert torch.__version__.partition("+")[0] in text
    assert str(tmp_path / "not" / "there") in text


def test_doctor_names_a_gpu_and_what_it_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (120e9, 150e9))
    doctor.show(doctor.examine(tmp_path, tmp_path), Console(width=200))
    text = capsys.readouterr().out
    assert "NVIDIA H200, compute capability 9.0, 120 of 150 GB free" in text
    assert "cuda: a GPU was found" in text
    assert "bfloat16" in text
