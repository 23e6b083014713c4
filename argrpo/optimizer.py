"""AdamW on fp32 masters, beside the working weights that the engine reads in place.

bf16 keeps 8 bits of a weight: at lr 1e-5 most updates of a bf16 weight are below half a unit in its
last place and vanish. So masters, gradients summed over micro-batches and Adam's moments are fp32,
and the working copy is rounded from the masters after each step, at the same addresses. An fp32
weight is its own master: nothing is held twice.

Bytes a weight, besides the working copy: bf16 16 (master, gradient, two moments), fp32 12.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"
_MASTER = "master"


class MasterAdamW:
    """Gradients of several backward passes -> one step of the weights.

    A weight that no micro-batch reached since the last step is left alone: no decay, no momentum.

    Example:
        optimizer = MasterAdamW(policy.named_parameters())
        for batch in micro_batches:
            loss(batch).backward()
            optimizer.accumulate()
        grad_norm = optimizer.step(lr=1e-5)
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
        fp32_masters: bool = True,
        norm: Callable[[list[Tensor]], Tensor] = get_total_norm,
    ) -> None:
        """Masters start as the weights are now.

        Args:
            named_parameters: bf16 or fp32, on their final device; frozen ones are left out.
            betas, eps, weight_decay: AdamW's; the decay is decoupled and applies to all weights.
            max_grad_norm: longer gradients, all weights taken as one vector, are scaled down to
                it; None never does.
            fp32_masters: False updates bf16 weights themselves, with bf16 gradients and moments,
                and so loses small updates as released codes do; for comparisons only.
            norm: of the main gradients, taken as one vector; another one where they are a part of
                those that are clipped together.

        Raises:
            ValueError: nothing to train, a weight is neither bf16 nor fp32, or a number is out of
                range.
        """
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected None or above 0, got {max_grad_norm}")
        self._max_grad_norm = max_grad_norm
        self._norm = norm
        self._working = {name: p for name, p in named_parameters if p.requires_grad}
        self._masters = {name: _master(name, p, fp32_masters) for name, p in self._working.items()}
        # What was added in fp32 to the gradient of a weight that has no fp32 master.
        self._unrounded: dict[str, Tensor] = {}
        if not self._masters:
            raise ValueError("named_parameters: expected at least one that requires a gradient")
        # One launch for all weights on a GPU; on a CPU 2.5 times as fast as the plain loop.
        self._adamw = torch.optim.AdamW(
            self._masters.values(), betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of a backward pass to the fp32 main gradients, and free them.

        Call it after the backward pass of each micro-batch. fp32 weights need nothing: autograd
        sums into their main gradients itself.
        """
        for name, added in self._unrounded.items():
            parameter = self._working[name]
            rounded = added.to(parameter.dtype)
            parameter.grad = rounded if parameter.grad is None else parameter.grad.add_(rounded)
        self._unrounded.clear()
        for name, parameter in self._working.items():
            master = self._masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def discard(self) -> None:
        """Forget the gradients since the last step."""
        self._unrounded.clear()
        for name, parameter in self._working.items():
            parameter.grad = None
            self._masters[name].grad = None

    def main_grad(self, name: str) -> Tensor:
        """The fp32 main gradient of a weight, for a kernel or a reduction that adds to it in place.

        Made of zeros if nothing has reached the weight yet, which then counts as reached. Ask again
        after each step, which frees it; without fp32 masters after each `accumulate`, which rounds.
        """
        master = self._masters[name]
        if master.dtype != torch.float32:
            zeros = torch.zeros_like(master, dtype=torch.float32)
            return self._unrounded.setdefault(name, zeros)
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip, update the masters, round them into the working weights, free the main gradients.

        With a norm that is not finite nothing is updated, neither weights nor moments: the
        gradients are dropped and the norm returned, so that the caller can count and stop.

        Args:
            lr: learning rate of this step, at least 0.

        Returns:
            The norm of the gradients of all weights, before clipping.

        Raises:
            ValueError: the learning rate is negative or not finite.
            RuntimeError: there are no gradients, or some were not accumulated.
        """
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr: expected a finite number of at least 0, got {lr}")
        reached = self._reached()
        total_norm = self._norm([master.grad for master in reached if master.grad is not None])
        # One host sync a step: whether to step at all depends on it, and the log needs it.
        norm = total_norm.item()
        if math.isfinite(norm):
            if self._max_grad_norm is not None and norm > self._max_grad_norm:
                clip_grads_with_norm_(reached, self._max_grad_norm, total_norm)
            self._adamw.param_groups[0]["lr"] = lr
            self._adamw.step()
            self._write_working()
        for master in reached:
            master.grad = None
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs besides the fp32 weights themselves, as flat names.

        master.<name> (bf16 weights only), exp_avg.<name>, exp_avg_sq.<name> and step.<name>; the
        last three only for weights that were reached at least once. The tensors are not copies.
        """
        state: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            if master is not self._working[name]:
                state[f"{_MASTER}.{name}"] = master.detach()
            for kind, value in self._adamw.state.get(master, {}).items():
                state[f"{kind}.{name}"] = value
        return state

    def own_state(self) -> dict[str, Tensor]:
        """The part of this rank in `state_dict`: all of it."""
        return self.state_dict()

    def load_own_state(self, own: Mapping[str, Tensor]) -> None:
        """As `load_state_dict`."""
        self.load_state_dict(own)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up where `state_dict` was read; rounds the masters into the working weights.

        fp32 weights are not part of it: load them into the policy. Nothing changes if it raises.

        Raises:
            ValueError: a name is missing or unknown, or a shape or dtype differs.
        """
        self._check_state(state)
        self._adamw.state.clear()
        for name, master in self._masters.items():
            if master is not self._working[name]:
                master.copy_(state[f"{_MASTER}.{name}"])
            if f"{_STEP}.{name}" in state:
                self._adamw.state[master] = {
                    kind: state[f"{kind}.{name}"].to(master.device, copy=True)
                    for kind in (_STEP, *_MOMENTS)
                }
            master.grad = None
            self._working[name].grad = None
        self._write_working()

    def _reached(self) -> list[Tensor]:
        for name, parameter in self._working.items():
            if self._masters[name] is not parameter and parameter.grad is not None:
                raise RuntimeError(
                    f"{name}: expected accumulate() after each backward pass, got a gradient that "
                    "was not accumulated"
                )
        reached = [master for master in self._masters.values() if master.grad is not None]
        if not reached:
            raise RuntimeError(
                "step: expected the gradients of at least one backward pass, got none"
            )
        return reached

    def _write_working(self) -> None:
        for name, parameter in self._working.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])
            else:
                # The fused step does not: caches keyed by the version, and autograd, would not see
                # that the weight changed.
                torch.autograd.graph.increment_version(parameter)

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        wanted: dict[str, tuple[int, ...]] = {}
        for name, master in self._masters.items():
            shape = tuple(master.shape)
            if master is not self._working[name]:
                wanted[f"{_MASTER}.{name}"] = shape
            if f"{_STEP}.{name}" in state:
                wanted |= {f"{_STEP}.{name}": (), **{f"{k}.{name}": shape for k in _MOMENTS}}
        wrong = sorted(wanted.keys() ^ state.keys())
        if wrong:
            kind = "missing" if wrong[0] in wanted else "unknown"
            raise ValueError(
                f"{wrong[0]}: expected the optimizer state of these weights, got a state where "
                f"{len(wrong)} names differ and this one is {kind}"
            )
        for key, shape in wanted.items():
            kind, _, name = key.partition(".")
            dtype = self._masters[name].dtype if kind in _MOMENTS else torch.float32
            if tuple(state[key].shape) != shape or state[key].dtype != dtype:
                raise ValueError(
                    f"{key}: expected {str(dtype).removeprefix('torch.')} {list(shape)}, "
                    f"got {state[key].dtype} {list(state[key].shape)}"
                )


def _master(name: str, parameter: nn.Parameter, in_fp32: bool) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    if parameter.dtype != torch.bfloat16:
        raise ValueError(
            f"{name}: expected bfloat16 or float32, got {parameter.dtype}; float16 would need its "
            "loss scaled"
        )
    return parameter.detach().float() if in_fp32 else parameter
