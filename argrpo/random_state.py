"""The global random generators of a process, which judges of the caller's may draw from.

Nothing of ours does: draws are counted from (seed, image, position), and what else is random has a
generator of its own.
"""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from argrpo.state_names import named

_MASK = 2**32 - 1


def seed_generators(seed: int) -> None:
    """Start all of them from a seed."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & _MASK)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Where torch's, numpy's and Python's generators stand."""
    _, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, next_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_place": torch.tensor([place, has_gauss]),
        "numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if next_gauss is None else [next_gauss]).double(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def check_random_state(state: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ValueError: a generator is missing or unknown, or its state is of another shape or dtype.
    """
    wanted = random_state(torch.device("cpu"))
    unknown = state.keys() - wanted.keys() - {"cuda"}
    for name in sorted(wanted.keys() | unknown):
        found, own = state.get(name), wanted.get(name)
        # Python's generator holds a number for next time, or does not.
        is_free = name == "python_gauss"
        if found is None or own is None or found.dtype != own.dtype:
            raise ValueError(f"random.{name}: expected the state of a generator, got another")
        if found.shape != own.shape and not (is_free and found.shape in ((0,), (1,))):
            raise ValueError(
                f"random.{name}: expected shape {list(own.shape)}, got {list(found.shape)}"
            )


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on where `random_state` was taken; a run that moved to a GPU keeps that one's.

    Raises:
        ValueError: a generator is missing.
    """
    place, has_gauss = named(state, "numpy_place").tolist()
    keys = named(state, "numpy").numpy().astype(np.uint32)
    version, *words = named(state, "python").tolist()
    gauss = named(state, "python_gauss").tolist()
    np.random.set_state(("MT19937", keys, place, has_gauss, float(named(state, "numpy_gauss"))))
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    torch.set_rng_state(named(state, "torch"))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
