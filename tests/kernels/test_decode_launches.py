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
from argrpo.engine.prefix import has_zero_rotary_prefix
from argrpo.models.image_policy import ImagePolicy
from argrpo.models.llamagen import LlamaGen, LlamaGenConfig
from argrpo.models.taming import Taming, TamingConfig

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


def _llamagen(num_layers: int) -> ImagePolicy:
    config = LlamaGenConfig(
        dim=32, num_layers=num_layers, num_heads=1, ffn_dim=32,
        vocab_size=16, image_size=32, num_classes=2,
    )  # fmt: skip
    return LlamaGen(config).requires_grad_(False).to(DEVICE)


def _taming(num_layers: int) -> ImagePolicy:
    config = TamingConfig(
        dim=32, num_layers=num_layers, num_heads=1,
        vocab_size=16, image_size=32, num_classes=2, num_positions=4,
    )  # fmt: skip
    return Taming(config).requires_grad_(False).to(DEVICE)


def _launches_of_a_step(policy: ImagePolicy, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Kernels and PyTorch's operations by name."""
    launches: Counter[str] = Counter()
    launch_of = KernelInterface.__getitem__

    def noted(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            launches[kernel.fn.__name__] += 1
            with _disable_current_modes():  # the interpreter moves tensors with PyTorch
                launch_of(kernel, grid)(*args, **options)

        return launch

    first_entry = 0 if has_zero_rotary_prefix(policy) else policy.shape.prefix_len
    plan = plan_cache(policy.shape, max_slots=4, page_size=16, itemsize=4, first_entry=first_entry)
    state = DecodeState(policy, plan)
    with monkeypatch.context() as patch, _Operations(launches):
        patch.setattr(KernelInterface, "__getitem__", noted)
        num_branches = 2 if policy.has_null_condition else 1
        decode_steps(policy, state, StepVariant(num_branches, False, False, False), 1)
    return launches


def test_a_layer_of_a_decode_step_takes_eight_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (_launches_of_a_step(_llamagen(depth), monkeypatch) for depth in (1, 2))
    assert not one - two
    layer = two - one
    assert layer == {"mm": 4, "_paged_decode_fwd": 1, "_rmsnorm_fwd": 2, "_swiglu_fwd": 1}
    assert layer.total() == 8


def test_a_taming_layer_takes_eight_and_its_places_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases are the products' own, but for the one that the GELU's kernel adds."""
    one, two = (_launches_of_a_step(_taming(depth), monkeypatch) for depth in (1, 2))
    assert not one - two
    layer = two - one
    products = {"addmm": 3, "mm": 1}
    assert layer == {**products, "_paged_decode_fwd": 1, "_layernorm_fwd": 2, "_bias_gelu_fwd": 1}
    assert layer.total() == 8
    # The same beside the layers as LlamaGen's step has: learned places are added with the log.
    beside, llamagen = one - layer, _launches_of_a_step(_llamagen(1), monkeypatch)
    of_its_layer = Counter({"mm": 4, "_paged_decode_fwd": 1, "_rmsnorm_fwd": 2, "_swiglu_fwd": 1})
    assert beside.total() <= (llamagen - of_its_layer).total()
