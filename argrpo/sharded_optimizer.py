"""AdamW whose masters and moments are spread over the ranks (ZeRO-1), for weights that stand whole
on each of them.

    gradients, fp32, all rows     reduce_scatter -> sums of the own rows
    own rows of the masters       AdamW, with the norm of all gradients
    own rows of the weights       all_gather -> the working weights, in their dtype

So every rank ends with the same weights, bit for bit: each row is made by one of them. What
travels is 4 bytes a weight and 2 more for bf16 (4 for fp32), at most what replicas would send.

torch's ZeroRedundancyOptimizer would spread the moments alone: masters stay whole on each rank, and
travel in fp32.

Bytes a weight, besides the working copy, on R ranks: bf16 4 + 12 / R, fp32 the same.

Shapes: n rows of a weight, S rows of its shard, see argrpo/row_shards.py.

Source: Rajbhandari et al., arXiv:1910.02054.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from argrpo.optimizer import MasterAdamW
from argrpo.ranks import gather_rows, is_first, sum_over_ranks
from argrpo.row_shards import all_gather, own_rows, padded, reduce_scatter, shard_of

_MASTER = "master"
_STEP = "step"


class ShardedAdamW:
    """As `MasterAdamW`, on the ranks of a run together: all of them call everything at once."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = 1.0,
        rounds_to: torch.dtype | None = None,
    ) -> None:
        """Masters start as the weights are now, the same on every rank.

        Args and Raises: as `MasterAdamW`, and
            named_parameters: may be spread over the ranks already, by rows and in fp32
                (sharded_policy.py); these are their own masters, and nothing of them travels here.
            rounds_to: the dtype of the weights that are saved beside a `state_dict`; None: that of
                `named_parameters`.
        """
        self._working = {name: p for name, p in named_parameters if p.requires_grad}
        self._spread = {name for name, p in self._working.items() if isinstance(p, DTensor)}
        self._shards = {name: nn.Parameter(_own_master(p)) for name, p in self._working.items()}
        dtypes = {rounds_to or p.dtype for p in self._working.values()}
        self._is_rounded = dtypes != {torch.float32}
        # Those of fp32 weights, where autograd sums itself, are the parameters' own.
        self._sums: dict[str, Tensor] = {}
        self._adamw = MasterAdamW(
            self._shards.items(),
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            norm=_norm_over_ranks,
        )

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of a backward pass to the fp32 main gradients, and free them."""
        for name, parameter in self._working.items():
            if parameter.dtype == torch.float32 or parameter.grad is None:
                continue
            if name in self._sums:
                self._sums[name].add_(parameter.grad)
            else:
                self._sums[name] = parameter.grad.float()
            parameter.grad = None

    def discard(self) -> None:
        """Forget this rank's gradients since the last step."""
        self._sums.clear()
        for parameter in self._working.values():
            parameter.grad = None

    def main_grad(self, name: str) -> Tensor:
        """The fp32 main gradient of a weight on this rank, see `MasterAdamW.main_grad`."""
        parameter = self._working[name]
        if parameter.dtype != torch.float32:
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(parameter, dtype=torch.float32)
            return self._sums[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """As `MasterAdamW.step`, on the gradients of all ranks summed.

        Raises:
            ValueError: the learning rate is negative or not finite.
            RuntimeError: no rank has a gradient, or one was not accumulated.
            PeerError: a rank failed.
        """
        reached = self._reached_anywhere()
        whole = [name for name in reached if name not in self._spread]
        sums = reduce_scatter([self.main_grad(name) for name in whole])
        for name, gradient in zip(whole, sums, strict=True):
            self._shards[name].grad = gradient
            self._sums.pop(name, None)
            self._working[name].grad = None
        self._take_own_gradients()
        norm = self._adamw.step(lr)
        if math.isfinite(norm):
            self._publish(whole)
        return norm

    def _take_own_gradients(self) -> None:
        """Those of spread weights, which the backward passes have summed over the ranks."""
        for name in self._spread:
            gradient = self._working[name].grad
            if isinstance(gradient, DTensor):
                self._shards[name].grad = gradient.to_local()
            self._working[name].grad = None

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """What `MasterAdamW.state_dict` holds, whole and on the CPU, on the first rank; on the
        others nothing, since one of them writes it.

        All ranks take part, a tensor at a time.
        """
        state: dict[str, Tensor] = {}
        for key, own in self.own_state().items():
            kind, _, name = key.partition(".")
            whole = own
            if kind != _STEP:
                shape = self._working[name].shape
                whole = own.new_empty(shape)
                all_gather([padded(own, shape[0])], [whole])
            if is_first():
                state[key] = whole.to("cpu", copy=True)
        return state

    def own_state(self) -> dict[str, Tensor]:
        """The own rows under the names of `state_dict`; not copies."""
        whole = {**self._masters(), **self._adamw.state_dict()}
        return {
            key: value if key.startswith(f"{_STEP}.") else self._unpadded(key, value)
            for key, value in whole.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up where `state_dict` was read, on any number of ranks, here or in `MasterAdamW`.

        Every rank is given all of it and keeps its own rows. fp32 weights are not part of it: load
        them into the policy before. Nothing changes if it raises.

        Raises:
            ValueError: a name is missing or unknown, or a shape or dtype differs.
            PeerError: another rank failed.
        """
        for key, value in state.items():
            weight = self._working.get(key.partition(".")[2])
            is_step = key.startswith(f"{_STEP}.")
            if weight is not None and not is_step and value.shape != weight.shape:
                raise ValueError(f"{key}: expected {list(weight.shape)}, got {list(value.shape)}")
        self.load_own_state(
            {
                key: value if key.startswith(f"{_STEP}.") else value[own_rows(len(value))]
                for key, value in state.items()
            }
        )

    @torch.no_grad()
    def load_own_state(self, own: Mapping[str, Tensor]) -> None:
        """As `load_state_dict`, where `own_state` was read on as many ranks, or dealt anew.

        Raises:
            ValueError: a name is missing or unknown, or a shape or dtype differs.
            PeerError: another rank failed.
        """
        masters = self._masters()
        wrong = sorted(masters.keys() ^ {key for key in own if key.startswith(f"{_MASTER}.")})
        if wrong:
            raise ValueError(
                f"{wrong[0]}: expected a master of each bf16 weight and of no other, got "
                f"{'none' if wrong[0] in masters else 'one'}"
            )
        self._adamw.load_state_dict(
            {key: self._padded(key, value) for key, value in own.items() if key not in masters}
        )
        for key, master in masters.items():
            master.copy_(self._padded(key, own[key]))
        whole = [name for name in self._working if name not in self._spread]
        if self._is_rounded:
            self._publish(whole)
        for name, parameter in self._working.items():
            if not self._is_rounded and name not in self._spread:
                self._shards[name].copy_(shard_of(parameter))
            parameter.grad = None
        self._sums.clear()

    def _publish(self, names: list[str]) -> None:
        """Write the rows of all ranks into working weights."""
        all_gather(
            [self._shards[name].to(self._working[name].dtype) for name in names],
            [self._working[name] for name in names],
        )

    def _masters(self) -> dict[str, Tensor]:
        """Of weights that are a rounded copy of theirs; the very shards."""
        names = self._working if self._is_rounded else []
        return {f"{_MASTER}.{name}": self._shards[name].detach() for name in names}

    def _unpadded(self, key: str, shard: Tensor) -> Tensor:
        rows = own_rows(len(self._working[key.partition(".")[2]]))
        return shard[: rows.stop - rows.start]

    def _padded(self, key: str, own: Tensor) -> Tensor:
        kind, _, name = key.partition(".")
        if kind == _STEP or name in self._spread or name not in self._working:
            return own
        return padded(own, len(self._working[name]))

    def _reached_anywhere(self) -> list[str]:
        """Weights with a gradient on some rank, in one order on all."""
        has_gradient = []
        for name, parameter in self._working.items():
            is_fp32 = parameter.dtype == torch.float32
            if not is_fp32 and parameter.grad is not None:
                raise RuntimeError(
                    f"{name}: expected accumulate() after each backward pass, got a gradient that "
                    "was not accumulated"
                )
            has_gradient.append(int(name in self._sums or parameter.grad is not None))
        counts = sum_over_ranks(torch.tensor(has_gradient)).tolist()
        reached = [name for name, count in zip(self._working, counts, strict=True) if count]
        if not reached:
            raise RuntimeError(
                "step: expected the gradients of at least one backward pass, got none"
            )
        return reached


def _own_master(parameter: nn.Parameter) -> Tensor:
    """fp32; of a spread weight the very storage."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    return shard_of(parameter.detach().float())


def _norm_over_ranks(gradients: list[Tensor]) -> Tensor:
    """[] fp32: of the own rows of all ranks together, summed in the order of the ranks."""
    square = get_total_norm(gradients).double().square()
    squares, _ = gather_rows(square.view(1, 1))
    return squares.sum().sqrt().float()
