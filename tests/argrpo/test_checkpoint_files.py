"""Files that hold weights and files that do not: read without running code, or refused by name."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from argrpo.models import checkpoint_files
from argrpo.models.checkpoint_files import read_checkpoint, write_folder


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {"norm.weight": torch.arange(64.0), "output.weight": torch.ones(40, 64)}


class _RunsCode:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("it_ran",)


@pytest.mark.parametrize("with_zip", [True, False])
def test_a_pickle_with_code_is_refused_by_its_global_and_does_not_run(
    with_zip: bool, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"model": weights, "callbacks": _RunsCode()}
    torch.save(content, "evil.pt", _use_new_zipfile_serialization=with_zip)
    with pytest.raises(ValueError, match=r"global posix\.mkdir.*convert it once") as refusal:
        read_checkpoint("evil.pt")
    assert "\n" not in str(refusal.value)
    assert not Path("it_ran").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_plain_pickle_is_named_with_what_it_would_import_and_does_not_run(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.pkl").write_bytes(pickle.dumps({"model": _RunsCode()}, protocol=protocol))
    said = r"evil\.pkl: expected .*, got a plain pickle with the global posix\.mkdir.*safetensors"
    with pytest.raises(ValueError, match=said) as refusal:
        read_checkpoint("evil.pkl")
    assert "\n" not in str(refusal.value)
    assert not Path("it_ran").exists()


def test_the_arguments_of_a_run_are_allowed_only_as_a_record(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "training.pt"
    torch.save({"model": weights, "args": argparse.Namespace(image_size=256)}, path)
    assert read_checkpoint(path).training_image_size == 256
    torch.save({"model": weights, "args": argparse.Namespace(hook=_RunsCode())}, path)
    with pytest.raises(ValueError, match=r"global posix\.mkdir"):
        read_checkpoint(path)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrapped_modules_are_stripped(
    prefix: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "policy.pt"
    torch.save({prefix + key: weight for key, weight in weights.items()}, path)
    assert read_checkpoint(path).weights.keys() == weights.keys()
    torch.save({prefix + "norm.weight": torch.ones(1), **weights}, path)
    with pytest.raises(ValueError, match=r"expected every weight once, got two for norm\.weight"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a torch or safetensors checkpoint, got an empty file"),
        (b"<html>not here</html>", "got a file that starts with b'<html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "got a Git LFS pointer"),
        (pickle.dumps({"a": 1}), "got a plain pickle without a global near its start"),
        (pickle.dumps({"a": 1})[:-2], "got a plain pickle without a global near its start"),
        (b"PK\x03\x04" + bytes(100), "expected a whole torch checkpoint, got a damaged one"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "policy.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        read_checkpoint(path)
    assert str(refusal.value).startswith(f"{path}: expected")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {}, {"model": {}}, {"model": {"a": 1}}])
def test_a_torch_file_without_weights_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "policy.pt")
    with pytest.raises(ValueError, match=r"policy\.pt: expected weights, bare or under one of"):
        read_checkpoint(tmp_path / "policy.pt")


@pytest.mark.parametrize("source", ["torch", "old torch", "safetensors"])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    source: str, fraction: float, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "policy"
    if source == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=source == "torch")
    assert read_checkpoint(path).weights.keys() == weights.keys()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(ValueError, match=r"policy: expected .*, got") as refusal:
        read_checkpoint(path)
    assert "\n" not in str(refusal.value)


def test_damage_anywhere_is_no_other_error(tmp_path: Path) -> None:
    path = tmp_path / "policy.pt"
    torch.save({"norm.weight": torch.ones(2)}, path)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_checkpoint(path)
        except ValueError:
            refused += 1
    assert refused > 10, "the rest hit padding and numbers, where any byte will do"


def test_a_missing_file_or_part_is_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt: expected .*, got nothing there"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match=r"config\.json: expected in a checkpoint folder"):
        read_checkpoint(tmp_path)
    write_folder(tmp_path / "policy", weights, {})
    (tmp_path / "policy" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: expected in a checkpoint"):
        read_checkpoint(tmp_path / "policy")


def test_a_folder_comes_back_and_leaves_nothing_beside_it(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "runs" / "new"):
        write_folder(folder, weights, {"format": "ours"})
        checkpoint = read_checkpoint(folder)
        assert checkpoint.config == {"format": "ours"}
        assert all(torch.equal(checkpoint.weights[key], weights[key]) for key in weights)
    assert sorted(os.listdir(tmp_path)) == ["empty", "runs"]
    assert os.listdir(tmp_path / "runs") == ["new"]


def test_a_folder_that_holds_something_is_not_written_to(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="expected a new or empty folder"):
            write_folder(folder, weights, {})
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("No space left")])
def test_a_failed_save_leaves_nothing(
    error: Exception,
    weights: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full_disk(weights: dict[str, Tensor], file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint_files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "policy", weights, {})
    assert os.listdir(tmp_path) == []
