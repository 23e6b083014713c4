"""An optimizer's state in parts on disk: read by any number of ranks, or refused."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from argrpo.optimizer import MasterAdamW
from argrpo.ranks import PeerError
from argrpo.run_folder import StorageError
from argrpo.sharded_optimizer import ShardedAdamW
from argrpo.sharded_state import read_shards, write_shards


def _model(dtype: torch.dtype) -> nn.Sequential:
    """Rows that 2, 3 and 4 do not divide, and fewer rows than ranks."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2), nn.Linear(2, 1)).to(dtype)


def _stepped(model: nn.Sequential, optimizer: MasterAdamW | ShardedAdamW) -> None:
    model(torch.ones(4, 5).to(model[0].weight.dtype)).float().square().sum().backward()
    optimizer.accumulate()
    optimizer.step(1e-2)


def _written(path: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = _model(dtype)
    optimizer = ShardedAdamW(model.named_parameters())
    _stepped(model, optimizer)
    write_shards(path, optimizer.own_state())
    return optimizer.state_dict(), model.state_dict()


def _read(path: Path, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = _model(weights["0.weight"].dtype)
    if weights["0.weight"].dtype == torch.float32:
        model.load_state_dict(weights)
    optimizer = ShardedAdamW(model.named_parameters())
    optimizer.load_own_state(read_shards(path))
    return optimizer.state_dict(), model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_read_by_any_number_of_ranks_bit_for_bit(
    run_ranks: Callable, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "optimizer"
    state, weights = run_ranks(2, _written, path, dtype)[0].result
    assert [file.name for file in tmp_path.glob(".*part")] == []
    whole = read_shards(path)  # this process alone
    assert whole.keys() == state.keys()
    alone = _model(dtype)
    if dtype == torch.float32:
        alone.load_state_dict(weights)
    optimizer = MasterAdamW(alone.named_parameters())
    optimizer.load_own_state(whole)
    for key, value in optimizer.state_dict().items():
        assert torch.equal(value, state[key]), key
    for name, weight in alone.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    for count in (3, 4):
        found, loaded = run_ranks(count, _read, path, weights)[0].result
        assert all(torch.equal(found[key], state[key]) for key in state), count
        assert all(torch.equal(loaded[name], weights[name]) for name in weights), count


def test_one_process_writes_what_several_read(run_ranks: Callable, tmp_path: Path) -> None:
    model = _model(torch.bfloat16)
    optimizer = MasterAdamW(model.named_parameters())
    _stepped(model, optimizer)
    write_shards(tmp_path / "optimizer", optimizer.own_state())
    found, _ = run_ranks(3, _read, tmp_path / "optimizer", model.state_dict())[0].result
    state = optimizer.state_dict()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "no manifest"])
def test_parts_that_were_harmed_are_refused_by_all(
    run_ranks: Callable, tmp_path: Path, harm: str
) -> None:
    path = tmp_path / "optimizer"
    model = _model(torch.bfloat16)
    optimizer = MasterAdamW(model.named_parameters())
    _stepped(model, optimizer)
    write_shards(path, optimizer.own_state())
    file = path / ("shards.json" if harm == "no manifest" else "__0_0.distcp")
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(content[:-10])
    else:
        file.unlink()
    wanted = "expected shards.json" if harm == "no manifest" else str(file)
    with pytest.raises(ValueError, match=re.escape(wanted)):
        read_shards(path)
    for ended in run_ranks(2, read_shards, path):
        assert wanted in str(ended.result)


def test_a_disk_that_refuses_leaves_no_folder_of_that_name(
    run_ranks: Callable, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "optimizer"
    first, second = run_ranks(2, _written, path, torch.float32)
    assert isinstance(first.result, StorageError)
    assert isinstance(second.result, PeerError)
    assert not path.exists()
