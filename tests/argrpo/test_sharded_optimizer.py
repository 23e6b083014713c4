"""Weights that several ranks train together: the same everywhere, and those of one process."""

import hashlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from argrpo.optimizer import MasterAdamW
from argrpo.ranks import num_ranks, own_rank
from argrpo.row_shards import all_gather, own_rows, reduce_scatter, shard_of
from argrpo.sharded_optimizer import ShardedAdamW

MICRO_BATCHES = 4
STEPS = 3


def _model(dtype: torch.dtype) -> nn.Sequential:
    """Rows that 2 and 4 do not divide, fewer rows than ranks, and a weight that is never used."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False), nn.Linear(3, 1))
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return model.to(dtype)


def _losses(model: nn.Module, step: int, rank: int, count: int) -> Iterator[Tensor]:
    """This rank's micro-batches of a step; all ranks together always have the same."""
    generator = torch.Generator().manual_seed(step)
    batches = torch.randn(MICRO_BATCHES, 6, 5, generator=generator)
    for batch in batches[rank::count]:
        yield model(batch.to(model[0].weight.dtype)).float().square().sum() * 10


def _train(
    model: nn.Module, optimizer: MasterAdamW | ShardedAdamW, first: int, last: int
) -> list[float]:
    norms = []
    for step in range(first, last):
        for loss in _losses(model, step, own_rank(), num_ranks()):
            loss.backward()
            # What the fused head does: it adds to the main gradient of its weight itself.
            optimizer.main_grad("1.weight").add_(0.01)
            optimizer.accumulate()
        norms.append(optimizer.step(1e-2))
    return norms


def _trained_together(dtype: torch.dtype) -> tuple[str, dict[str, Tensor], list[float]]:
    model = _model(dtype)
    optimizer = ShardedAdamW(model.named_parameters(), weight_decay=0.1)
    norms = _train(model, optimizer, 0, STEPS)
    state = model.state_dict()
    digest = hashlib.sha256(b"".join(v.float().numpy().tobytes() for v in state.values()))
    return digest.hexdigest(), state, norms


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_end_with_the_same_weights_and_those_of_one_process(
    run_ranks: Callable, dtype: torch.dtype, count: int
) -> None:
    alone = _model(dtype)
    norms = _train(alone, MasterAdamW(alone.named_parameters(), weight_decay=0.1), 0, STEPS)
    digests = set()
    for ended in run_ranks(count, _trained_together, dtype):
        digest, weights, norms_together = ended.result
        digests.add(digest)
        # Gradients are summed in another order, and Adam's first steps have the size of lr whatever
        # the gradient's is: a hundredth of a step in fp32, one place of bf16 in weights up to 2.
        atol = 1e-4 if dtype == torch.float32 else 2**-7
        for name, weight in alone.state_dict().items():
            torch.testing.assert_close(weights[name], weight, atol=atol, rtol=0, msg=name)
        assert norms_together == pytest.approx(norms, rel=1e-5 if atol < 1e-3 else 1e-2)
        assert weights["unused"].tolist() == [1, 1, 1]  # no decay either
    assert len(digests) == 1


def _continued(
    dtype: torch.dtype, state: dict[str, Tensor], weights: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = _model(dtype)
    model.load_state_dict(weights)
    optimizer = ShardedAdamW(model.named_parameters(), weight_decay=0.1)
    optimizer.load_state_dict(state)
    _train(model, optimizer, 2, 3)
    return model.state_dict(), optimizer.state_dict()


def _saved(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = _model(dtype)
    optimizer = ShardedAdamW(model.named_parameters(), weight_decay=0.1)
    _train(model, optimizer, 0, 2)
    return model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_is_taken_up_by_another_number_of_ranks(
    run_ranks: Callable, dtype: torch.dtype
) -> None:
    first, second = run_ranks(2, _saved, dtype)
    weights, state = first.result
    assert second.result[1] == {}
    two = run_ranks(2, _trained_together, dtype)[0].result[1]
    (four, state_of_four), *_ = [e.result for e in run_ranks(4, _continued, dtype, state, weights)]
    alone = _model(dtype)
    alone.load_state_dict(weights)
    optimizer = MasterAdamW(alone.named_parameters(), weight_decay=0.1)
    optimizer.load_state_dict(state)
    assert state.keys() == optimizer.state_dict().keys() == state_of_four.keys()
    _train(alone, optimizer, 2, 3)
    again = run_ranks(2, _continued, dtype, state, weights)[1].result[0]
    for name, weight in two.items():
        # One step after the same state; see the tolerance above.
        for other in (four[name], alone.state_dict()[name]):
            torch.testing.assert_close(other, weight, atol=1e-4, rtol=1e-2)
        assert torch.equal(again[name], weight), name


def _refused(state: dict[str, Tensor]) -> str:
    model = _model(torch.bfloat16)
    optimizer = ShardedAdamW(model.named_parameters())
    before = optimizer.state_dict()
    with pytest.raises(ValueError) as refusal:
        optimizer.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in optimizer.state_dict().items())
    return str(refusal.value)


def test_a_state_of_other_weights_is_refused(run_ranks: Callable) -> None:
    state = run_ranks(2, _saved, torch.bfloat16)[0].result[1]
    missing = {k: v for k, v in state.items() if k != "master.0.bias"}
    short = {**state, "exp_avg.0.weight": torch.zeros(6, 5)}
    for wrong, message in (
        (missing, "master.0.bias: expected a master of each bf16 weight"),
        (short, r"exp_avg.0.weight: expected [7, 5], got [6, 5]"),
        ({**state, "exp_avg.other": torch.zeros(1)}, "exp_avg.other"),
    ):
        for ended in run_ranks(2, _refused, wrong):
            assert message in ended.result


def _not_finite() -> tuple[float, bool]:
    model = _model(torch.bfloat16)
    optimizer = ShardedAdamW(model.named_parameters())
    before = model[0].weight.clone()
    optimizer.main_grad("0.weight").fill_(torch.nan if own_rank() == 1 else 1.0)
    norm = optimizer.step(1e-2)
    return norm, torch.equal(model[0].weight, before)


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all(run_ranks: Callable) -> None:
    for ended in run_ranks(2, _not_finite):
        norm, is_unchanged = ended.result
        assert norm != norm and is_unchanged


def _exchanged() -> tuple[list[Tensor], list[Tensor]]:
    shapes = [(7, 2), (2,), (8, 3), (1, 1)]
    whole = [torch.arange(torch.Size(s).numel()).view(s).float() for s in shapes]
    sums = reduce_scatter([w * (own_rank() + 1) for w in whole])
    gathered = [torch.full_like(w, torch.nan) for w in whole]
    all_gather([shard_of(w) for w in whole], gathered)
    own = [total[: len(w[own_rows(len(w))])] for total, w in zip(sums, whole, strict=True)]
    return own, gathered


@pytest.mark.parametrize("bucket_bytes", [1, 64, 2**20])
def test_rows_are_dealt_summed_and_gathered_in_buckets_of_any_size(
    run_ranks: Callable, monkeypatch: pytest.MonkeyPatch, bucket_bytes: int
) -> None:
    monkeypatch.setattr("argrpo.row_shards._BUCKET_BYTES", bucket_bytes)
    results = [ended.result for ended in run_ranks(3, _exchanged)]
    whole = results[0][1]
    assert [tuple(w.shape) for w in whole] == [(7, 2), (2,), (8, 3), (1, 1)]
    for i, tensor in enumerate(whole):
        assert torch.equal(tensor.flatten(), torch.arange(tensor.numel()).float())
        assert torch.equal(torch.cat([own[i] for own, _ in results]), tensor * 6)
