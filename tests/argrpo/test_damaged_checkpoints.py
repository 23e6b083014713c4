"""A checkpoint with any file missing, changed or of another make is refused, and the file named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_checkpoints import FILES, snapshot

from argrpo.checkpoints import InvalidCheckpoint, read_checkpoint, write_checkpoint
from argrpo.tensor_file import record_of


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "empty", "longer"])
def test_a_damaged_file_is_rejected_by_name(tmp_path: Path, name: str, damage: str) -> None:
    path, _ = write_checkpoint(tmp_path, snapshot(1), None)
    file = path / name
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        damaged = {"truncated": content[:-1], "flipped": bytes(flipped), "empty": b""}
        file.write_bytes(damaged.get(damage, content + b"\n "))
    if name == "manifest.json" and damage in ("truncated", "longer"):
        read_checkpoint(path)  # the line's end says nothing
    else:
        # A flipped bit of the manifest may be in the name of another file.
        wanted = "" if (name, damage) == ("manifest.json", "flipped") else name
        with pytest.raises(InvalidCheckpoint) as refusal:
            read_checkpoint(path)
        assert wanted in str(refusal.value)


def test_a_damaged_or_missing_reference_is_rejected(tmp_path: Path) -> None:
    path, reference = write_checkpoint(tmp_path, snapshot(1), None)
    weights = tmp_path / str(reference) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=r"reference_.*model\.safetensors: expected sha256"):
        read_checkpoint(path)
    (tmp_path / str(reference)).rename(tmp_path / "elsewhere")
    with pytest.raises(InvalidCheckpoint, match=r"reference_.*: expected manifest\.json"):
        read_checkpoint(path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that each example damages and mends."""
    return write_checkpoint(tmp_path_factory.mktemp("fuzz"), snapshot(3, size=16), None)[0]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_an_error_that_is_told(written: Path, data: st.DataObject) -> None:
    file = written / data.draw(st.sampled_from(FILES))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["byte", "cut", "insert", "drop"]))
    if kind == "byte":
        content[place] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = data.draw(st.binary(min_size=1, max_size=8))
    else:
        del content[place]
    before = file.read_bytes()
    is_same = bytes(content) == before
    file.write_bytes(bytes(content))
    try:
        found = read_checkpoint(written)
    except InvalidCheckpoint:
        return
    finally:
        file.write_bytes(before)
    # Only in what nothing depends on: white space, or the manifest's words for what is checked.
    assert is_same or file.name == "manifest.json"
    assert found.position.step == 3
    assert all((weight == 3).all() for weight in found.model.values())


@pytest.mark.parametrize("harm", ["missing", "flipped", "no list", "other list"])
def test_an_optimizer_in_parts_is_checked_with_its_checkpoint(tmp_path: Path, harm: str) -> None:
    name = "optimizer_step_000001"
    state = {"optimizer_parts": name}
    path, _ = write_checkpoint(tmp_path, replace(snapshot(1), state=state), None)
    parts = tmp_path / name
    parts.mkdir()
    for file in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (parts / file).write_bytes(file.encode())
    listed = {file.name: list(record_of(file)) for file in parts.iterdir()}
    (parts / "shards.json").write_text(json.dumps(listed))
    read_checkpoint(path)
    match harm:
        case "missing":
            (parts / "__1_0.distcp").unlink()
        case "flipped":
            (parts / "__1_0.distcp").write_bytes(b"__1_1.distcp")
        case "no list":
            (parts / "shards.json").unlink()
        case "other list":
            (parts / "shards.json").write_text(json.dumps(dict.fromkeys(listed, 3)))
    wanted = "__1_0.distcp" if harm in ("missing", "flipped") else "shards.json"
    with pytest.raises(InvalidCheckpoint, match=f"{name}.*{wanted}"):
        read_checkpoint(path)


def test_a_checkpoint_of_another_version_is_not_guessed_at(tmp_path: Path) -> None:
    path, _ = write_checkpoint(tmp_path, snapshot(1), None)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(InvalidCheckpoint, match=r"argrpo-checkpoint 1, got .* 2; another"):
        read_checkpoint(path)


def test_a_file_with_a_right_hash_and_wrong_content_is_refused(tmp_path: Path) -> None:
    path, _ = write_checkpoint(tmp_path, snapshot(1), None)
    (path / "training.safetensors").unlink()
    save_file({"a": torch.zeros(1)}, path / "training.safetensors")
    (path / "training.json").write_text("[1, 2]")
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("training.safetensors", "training.json"):
        manifest["files"][name] = record_of(path / name)._asdict()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidCheckpoint, match=r"training\.json: expected a JSON object"):
        read_checkpoint(path)
