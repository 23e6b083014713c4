"""engine/decode_step.py on the kernels: what a step launches."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.jit import KernelInterface

from argrpo.engine.cache_plan import plan_cache
from argrpo.engine.decode_step import DecodeState, StepVariant, decode_steps
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Beside views: memory without values, which these tests fill with NaN.
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "fill_", "_unsafe_view"}


class _Operations(TorchDispatchMode):
    """Notes PyTorch's operations that launch something on a GPU."""

    def __init__(self, launches: Counter[str]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        name = str(func.overloadpacket).removeprefix("aten.")
        if not func.is_view and name not in NO_LAUNCH:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


def _launches_of_a_step(num_layers: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Kernels and PyTorch's operations by name."""
    launches: Counter[str] = Counter()
    launch_of = KernelInterface.__getitem__

    def noted(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            launches[kernel.fn.__name__] += 1
            with _disable_current_modes():  # the interpreter moves tensors with PyTorch
                launch_of(kernel, grid)(*args, **options)

        return launch

    config = LlamaGenConfig(
        dim=32, num_layers=num_layers, num_heads=1, ffn_dim=32,
        vocab_size=16, image_size=32, num_classes=2,
    )  # fmt: skip
    policy = LlamaGen(config).requires_grad_(False).to(DEVICE)
    plan = plan_cache(policy.shape, max_slots=4, page_size=16, itemsize=4)
    state = DecodeState(policy, plan)
    with monkeypatch.context() as patch, _Operations(launches):
        patch.setattr(KernelInterface, "__getitem__", noted)
        decode_steps(policy, state, StepVariant(2, False, False, False), 1)
    return launches


def test_a_layer_of_a_decode_step_takes_eight_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (_launches_of_a_step(depth, monkeypatch) for depth in (1, 2))
    assert not one - two
    layer = two - one
    assert layer == {"mm": 4, "_paged_decode_fwd": 1, "_rmsnorm_fwd": 2, "_swiglu_fwd": 1}
    assert layer.total() == 8
