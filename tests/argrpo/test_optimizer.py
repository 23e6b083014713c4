"""The optimizer: fp32 masters beside bf16 weights, gradients, clipping, bad steps, resuming."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from argrpo.optimizer import MasterAdamW

LR = 1e-5
both_dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"]
)
SHAPES = {"embedding": (31, 8), "norm": (8,), "head": (17, 8)}


def weights(dtype: torch.dtype) -> nn.ParameterDict:
    """Weights as a checkpoint has them: std 0.02, representable in bf16."""
    generator = torch.Generator().manual_seed(1)
    return nn.ParameterDict(
        {
            name: nn.Parameter(
                (0.02 * torch.randn(shape, generator=generator)).bfloat16().to(dtype)
            )
            for name, shape in SHAPES.items()
        }
    )


def gradients(count: int, scale: float = 1.0) -> Iterator[dict[str, Tensor]]:
    """As a backward pass leaves them, in bf16."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        yield {
            name: (scale * torch.randn(shape, generator=generator)).bfloat16()
            for name, shape in SHAPES.items()
        }


def backward(parameters: nn.ParameterDict, grads: dict[str, Tensor]) -> None:
    """A backward pass with these gradients."""
    torch.autograd.backward([parameters[name] for name in grads], list(grads.values()))


def take_step(
    parameters: nn.ParameterDict, optimizer: MasterAdamW, grads: dict[str, Tensor], lr: float = LR
) -> float:
    backward(parameters, grads)
    optimizer.accumulate()
    return optimizer.step(lr)


def snapshot(parameters: nn.ParameterDict, optimizer: MasterAdamW) -> dict[str, Tensor]:
    state = {**parameters, **optimizer.state_dict()}
    return {name: value.detach().clone() for name, value in state.items()}


def test_masters_take_the_steps_of_plain_fp32_adamw_bitwise() -> None:
    working, plain = weights(torch.bfloat16), weights(torch.float32)
    optimizer = MasterAdamW(working.items(), betas=(0.9, 0.95), weight_decay=0.01)
    adamw = torch.optim.AdamW(plain.values(), betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for step, grads in enumerate(gradients(20)):
        lr = LR * (1 + step % 3)
        norm = take_step(working, optimizer, grads, lr)

        backward(plain, grads)
        want = nn.utils.clip_grad_norm_(plain.values(), 1.0)
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        adamw.zero_grad()
        assert norm == want.item() > 1, "the norm before clipping, and a step that is clipped"
    state = optimizer.state_dict()
    for name, parameter in plain.items():
        assert torch.equal(state[f"master.{name}"], parameter), name
        assert torch.equal(working[name], parameter.bfloat16()), name


def test_masters_keep_the_small_steps_that_bf16_weights_swallow() -> None:
    working, pure = weights(torch.bfloat16), weights(torch.bfloat16)
    start = {name: value.detach().float().clone() for name, value in pure.items()}
    optimizer = MasterAdamW(working.items())
    adamw = torch.optim.AdamW(pure.values(), lr=LR)
    # The same direction every time, so that the whole path of n steps is n * LR a weight.
    (grads,) = gradients(1)
    num_steps = 60
    for step in range(num_steps):
        take_step(working, optimizer, grads)
        backward(pure, grads)
        adamw.step()
        adamw.zero_grad()
        if step == 0:
            state = optimizer.state_dict()
            moved = torch.cat([(state[f"master.{n}"] != start[n]).flatten() for n in SHAPES])
            shown = torch.cat([(working[n].float() != start[n]).flatten() for n in SHAPES])
            assert moved.float().mean() > 0.99
            assert shown.float().mean() < 0.3, "one step is below half a unit of most bf16 weights"

    def distance(parameters: nn.ParameterDict) -> float:
        moved = [(parameters[name].float() - start[name]).abs().flatten() for name in SHAPES]
        return torch.cat(moved).mean().item()

    whole_path = num_steps * LR
    assert distance(working) == pytest.approx(whole_path, rel=0.05)  # rounding of single weights
    assert distance(pure) < 0.6 * whole_path, "weights near 0 still move, the others stand still"


def test_micro_batches_sum_in_fp32_and_their_gradients_are_freed() -> None:
    working = weights(torch.bfloat16)
    optimizer = MasterAdamW(working.items(), max_grad_norm=None)
    want = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    rounded = {name: torch.zeros(shape).bfloat16() for name, shape in SHAPES.items()}
    for grads in gradients(40):
        backward(working, grads)
        optimizer.accumulate()
        assert all(parameter.grad is None for parameter in working.values())
        for name, grad in grads.items():
            want[name] += grad
            rounded[name] += grad
    for name in SHAPES:
        got = optimizer.main_grad(name)
        assert got.dtype == torch.float32
        assert torch.equal(got, want[name]), name
        assert not torch.equal(got, rounded[name].float()), "bf16 sums would have lost bits"


def test_fp32_weights_are_their_own_masters() -> None:
    parameters, plain = weights(torch.float32), weights(torch.float32)
    optimizer = MasterAdamW(parameters.items())
    adamw = torch.optim.AdamW(plain.values(), lr=LR, weight_decay=0.0, fused=True)
    for _ in range(3):
        for grads in gradients(4):
            backward(parameters, grads)
            optimizer.accumulate()
            backward(plain, grads)
        for name, parameter in parameters.items():
            assert optimizer.main_grad(name) is parameter.grad, "no second copy"
        nn.utils.clip_grad_norm_(plain.values(), 1.0)
        adamw.step()
        adamw.zero_grad()
        optimizer.step(LR)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, plain[name]), name
    assert not [name for name in optimizer.state_dict() if name.startswith("master.")]


@both_dtypes
def test_weights_stay_at_their_addresses_and_say_that_they_changed(dtype: torch.dtype) -> None:
    parameters = weights(dtype)
    optimizer = MasterAdamW(parameters.items())
    addresses = [parameter.data_ptr() for parameter in parameters.values()]
    for grads in gradients(3):
        before = {name: value.detach().clone() for name, value in parameters.items()}
        versions = [parameter._version for parameter in parameters.values()]
        take_step(parameters, optimizer, grads, 1e-2)
        assert all(not torch.equal(parameters[name], before[name]) for name in SHAPES)
        assert all(
            parameter._version > version
            for parameter, version in zip(parameters.values(), versions, strict=True)
        ), "autograd would not notice a graph that spans the step"
    assert [parameter.data_ptr() for parameter in parameters.values()] == addresses


@both_dtypes
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_norm_that_is_not_finite_changes_nothing(dtype: torch.dtype, bad: float) -> None:
    parameters, twin = weights(dtype), weights(dtype)
    optimizers = [MasterAdamW(each.items()) for each in (parameters, twin)]
    first, spoilt, last = gradients(3)
    spoilt["norm"][3] = bad
    for each, optimizer in zip((parameters, twin), optimizers, strict=True):
        take_step(each, optimizer, first)
    before = snapshot(parameters, optimizers[0])
    norm = take_step(parameters, optimizers[0], spoilt)
    assert not torch.isfinite(torch.tensor(norm))
    after = snapshot(parameters, optimizers[0])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The bad gradients are gone: the next step is that of a run which never saw them.
    for each, optimizer in zip((parameters, twin), optimizers, strict=True):
        take_step(each, optimizer, last)
    assert all(torch.equal(parameters[name], twin[name]) for name in SHAPES)


def test_only_long_gradients_are_scaled() -> None:
    (grads,) = gradients(1)
    first_moments = {}
    for limit in (None, 1e9, 0.5):
        parameters = weights(torch.bfloat16)
        optimizer = MasterAdamW(parameters.items(), max_grad_norm=limit)
        norm = take_step(parameters, optimizer, grads)
        want = torch.cat([grad.double().flatten() for grad in grads.values()]).norm().item()
        assert norm == pytest.approx(want, rel=1e-6)  # fp32 sum of 392 squares
        state = optimizer.state_dict()
        first_moments[limit] = torch.cat([state[f"exp_avg.{name}"].flatten() for name in SHAPES])
    assert torch.equal(first_moments[None], first_moments[1e9])
    # Adam's first moment after one step is 0.1 of the gradient that it saw.
    assert first_moments[0.5].norm().item() == pytest.approx(0.05, rel=1e-5)


@both_dtypes
def test_a_weight_that_nothing_reached_is_left_alone(dtype: torch.dtype) -> None:
    parameters = weights(dtype)
    optimizer = MasterAdamW(parameters.items(), weight_decay=0.5)
    both, only_head = gradients(2)
    del both["embedding"], only_head["embedding"], only_head["norm"]
    take_step(parameters, optimizer, both, 0.1)
    before = snapshot(parameters, optimizer)
    take_step(parameters, optimizer, only_head, 0.1)
    after = snapshot(parameters, optimizer)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if name.endswith("head")}, "no decay, no momentum"
    assert "exp_avg.embedding" not in after


@both_dtypes
def test_a_kernel_may_add_to_the_main_gradient_itself(dtype: torch.dtype) -> None:
    direct, usual = weights(dtype), weights(dtype)
    one, other = MasterAdamW(direct.items()), MasterAdamW(usual.items())
    for _ in range(2):
        for grads in gradients(3):
            backward(usual, grads)
            other.accumulate()
            one.main_grad("head").add_(grads.pop("head"))
            backward(direct, grads)
            one.accumulate()
        assert one.step(LR) == other.step(LR)
    assert all(torch.equal(direct[name], usual[name]) for name in SHAPES)


@both_dtypes
def test_a_resumed_run_takes_the_same_steps_bitwise(dtype: torch.dtype) -> None:
    parameters = weights(dtype)
    optimizer = MasterAdamW(parameters.items(), weight_decay=0.01)
    grads = list(gradients(6))
    for each in grads[:3]:
        take_step(parameters, optimizer, each)
    saved = {name: value.clone() for name, value in optimizer.state_dict().items()}
    # Masters bring bf16 weights back; fp32 weights come from the policy's own file.
    resumed = weights(dtype) if dtype == torch.bfloat16 else copy.deepcopy(parameters)
    again = MasterAdamW(resumed.items(), weight_decay=0.01)
    again.load_state_dict(saved)
    for each in grads[3:]:
        for run, stepper in ((parameters, optimizer), (resumed, again)):
            take_step(run, stepper, each)
    want, got = snapshot(parameters, optimizer), snapshot(resumed, again)
    assert want.keys() == got.keys()
    for name in want:
        assert torch.equal(want[name], got[name]), name
    assert all(saved[f"step.{name}"] == 3 for name in SHAPES), "loading copies: nothing is shared"


def test_a_state_of_other_weights_is_refused_whole() -> None:
    parameters = weights(torch.bfloat16)
    optimizer = MasterAdamW(parameters.items())
    (grads,) = gradients(1)
    take_step(parameters, optimizer, grads)
    good = {name: value.clone() for name, value in optimizer.state_dict().items()}
    missing = {name: value for name, value in good.items() if name != "exp_avg.norm"}
    short = good | {"master.norm": good["master.norm"][:-1]}
    rounded = good | {"exp_avg_sq.head": good["exp_avg_sq.head"].bfloat16()}
    for state, message in (
        (missing, "exp_avg.norm: .* this one is missing"),
        (good | {"step.tail": torch.ones(())}, "step.tail: .* this one is unknown"),
        (short, r"master.norm: expected float32 \[8\], got torch.float32 \[7\]"),
        (rounded, r"exp_avg_sq.head: expected float32 \[17, 8\], got torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict({name: value + 1 for name, value in state.items()})
    assert all(torch.equal(value, good[name]) for name, value in optimizer.state_dict().items())


def test_frozen_weights_are_left_out() -> None:
    parameters = weights(torch.bfloat16)
    parameters["head"].requires_grad_(False)
    assert set(MasterAdamW(parameters.items()).state_dict()) == {"master.embedding", "master.norm"}
    with pytest.raises(ValueError, match="named_parameters: expected at least one that requires"):
        MasterAdamW(parameters.requires_grad_(False).items())


def test_wrong_use_is_refused_by_name() -> None:
    half = nn.Parameter(torch.zeros(3).half())
    with pytest.raises(ValueError, match=r"w: expected bfloat16 or float32, got torch\.float16"):
        MasterAdamW([("w", half)])
    parameters = weights(torch.bfloat16)
    with pytest.raises(ValueError, match="max_grad_norm: expected None or above 0, got 0"):
        MasterAdamW(parameters.items(), max_grad_norm=0.0)
    optimizer = MasterAdamW(parameters.items())
    with pytest.raises(RuntimeError, match="step: expected the gradients of at least one backward"):
        optimizer.step(LR)
    (grads,) = gradients(1)
    backward(parameters, grads)
    with pytest.raises(RuntimeError, match=r"embedding: expected accumulate\(\) after each"):
        optimizer.step(LR)
    optimizer.accumulate()
    for lr in (-1e-5, float("nan")):
        with pytest.raises(ValueError, match=rf"lr: expected .*, got {lr}"):
            optimizer.step(lr)


def test_without_fp32_masters_the_steps_are_those_of_plain_bf16_adamw_bitwise() -> None:
    working, plain = weights(torch.bfloat16), weights(torch.bfloat16)
    optimizer = MasterAdamW(working.items(), fp32_masters=False, max_grad_norm=None)
    adamw = torch.optim.AdamW(plain.values(), weight_decay=0.0, fused=True, lr=LR)
    for grads in gradients(5):
        take_step(working, optimizer, grads)
        backward(plain, grads)
        adamw.step()
        adamw.zero_grad()
    for name, parameter in plain.items():
        assert torch.equal(working[name], parameter), name
    state = optimizer.state_dict()
    assert not [name for name in state if name.startswith("master.")]
    assert state["exp_avg.head"].dtype == torch.bfloat16
    resumed = MasterAdamW(working.items(), fp32_masters=False)
    resumed.load_state_dict({name: value.clone() for name, value in state.items()})
    assert torch.equal(resumed.state_dict()["exp_avg_sq.norm"], state["exp_avg_sq.norm"])
    with pytest.raises(ValueError, match=r"exp_avg.*: expected float32|master.*is missing"):
        MasterAdamW(working.items()).load_state_dict(state)


def test_without_fp32_masters_what_a_kernel_adds_is_rounded_once_a_micro_batch() -> None:
    working = weights(torch.bfloat16)
    optimizer = MasterAdamW(working.items(), fp32_masters=False)
    for _ in range(2):
        optimizer.main_grad("head").add_(1 / 3)
        assert optimizer.main_grad("head").dtype == torch.float32
        optimizer.accumulate()
    third = torch.tensor(1 / 3).bfloat16()
    assert working["head"].grad is not None
    assert torch.equal(working["head"].grad, (third + third).expand_as(working["head"]))
