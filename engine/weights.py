"""What the engine must know of the weights that it reads in place: whether they moved, whether they
are still the ones that it was built for."""

import torch
from torch import Tensor

from argrpo.engine.policy import Policy

# How the usual libraries name what they add beside a weight.
_ADAPTER_NAMES = ("lora_", "base_layer.", "parametrizations.", "modules_to_save.", ".adapter")


def weights_version(policy: Policy) -> tuple[int, ...]:
    """Changes whenever a weight is written or replaced.

    PyTorch counts the in-place writes of every tensor (an optimizer step, a loaded state dict), so
    that nobody has to remember to tell us. It does not count writes through `.data`: do without.
    """
    return tuple(count for p in _weights(policy).values() for count in (p.data_ptr(), p._version))


def weights_addresses(policy: Policy) -> tuple[int, ...]:
    """What a captured step has baked in."""
    return tuple(p.data_ptr() for p in _weights(policy).values())


class WeightsSeal:
    """The names, shapes, dtype and device of a policy's weights as an engine was built for them."""

    def __init__(self, policy: Policy) -> None:
        """
        Raises:
            ValueError: adapters, weights of more than one dtype, or made in inference mode.
        """
        weights = _weights(policy)
        for name, weight in weights.items():
            if weight.is_inference():
                raise ValueError(
                    f"policy: expected weights whose changes can be seen, got {name} made in "
                    "torch.inference_mode; load the policy outside of it"
                )
            if any(part in name for part in _ADAPTER_NAMES):
                raise ValueError(
                    f"policy: expected plain weights, got an adapter ({name}); the engine reads "
                    "weights in place and would draw without it: merge it into the weights first"
                )
        dtypes = {p.dtype for p in weights.values()}
        if len(dtypes) != 1:
            raise ValueError(
                "policy: expected weights of one dtype, got "
                f"{', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}"
            )
        self.dtype: torch.dtype = dtypes.pop()
        self._sealed = {name: _kind(p) for name, p in weights.items()}

    def check(self, policy: Policy) -> None:
        """
        Raises:
            ValueError: a weight came, went, or changed its shape, dtype or device.
        """
        now = {name: _kind(p) for name, p in _weights(policy).items()}
        if now == self._sealed:
            return
        for name in sorted(now.keys() | self._sealed.keys()):
            if now.get(name) != self._sealed.get(name):
                raise ValueError(
                    f"policy: expected {name} as the engine was built for it "
                    f"({self._sealed.get(name, 'absent')}), got {now.get(name, 'absent')}; "
                    "build a new RolloutEngine"
                )


def _weights(policy: Policy) -> dict[str, Tensor]:
    return dict(policy.named_parameters())


def _kind(weight: Tensor) -> str:
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"{dtype} {list(weight.shape)} on {weight.device}"
