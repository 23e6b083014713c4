"""What every test may rely on: fixed seeds, no network, golden files, honest uninitialised memory.

A run that names only tests/kernels on a machine without a GPU switches Triton's interpreter on, so
that `pytest tests/kernels/test_rmsnorm.py` tests the kernel and not its reference against itself.
All other tests run the path that a user on a CPU runs, hence two processes in `make test`. What
tests in several folders share beside that stands in tests/fixtures, a subject a file.
"""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

# These import argrpo inside fixtures alone: whoever imports a kernel fixes its interpreter.
pytest_plugins = (
    "engine_kinds",
    "rank_processes",
    "rollout_scripts",
    "scripted_servers",
    "small_models",
)

TESTS = Path(__file__).parent
KERNEL_TESTS = TESTS / "kernels"
ENGINE_TESTS = TESTS / "engine"

# A missing local file must be an error in a test, never a download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config: pytest.Config) -> None:
    named = [(config.invocation_params.dir / arg.split("::")[0]).resolve() for arg in config.args]
    only_kernels = all(path.is_relative_to(KERNEL_TESTS) for path in named)
    if only_kernels and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if _interpreted():
        _check_interpreter()
    # The tests' tensors are tiny: more threads wait for each other, on a busy machine for seconds.
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    if _interpreted():
        return "kernels: Triton's interpreter"
    if torch.cuda.is_available():
        return f"kernels: {torch.cuda.get_device_name()}"
    return "kernels: references only; run tests/kernels on its own for the interpreter"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = "needs a CUDA GPU, found none"
    elif _interpreted():
        reason = "needs a CUDA GPU, but Triton's interpreter is on"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def golden() -> Path:
    """The folder of golden cases, one sub-folder each."""
    return TESTS / "golden"


@pytest.fixture
def files_up_to() -> Callable[[int], AbstractContextManager[None]]:
    """`with files_up_to(4096):` the system refuses to let a file grow further, as a full disk."""
    return _files_up_to


@contextmanager
def _files_up_to(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # library code may draw from the global state


@pytest.fixture(autouse=True)
def _empty_holds_nan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves a value unwritten, or reads past its mask, shows it as NaN."""
    if not request.path.is_relative_to(KERNEL_TESTS):
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _filled_with_nan(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _scattered_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page tables are never in order, so that nothing can rely on neighbours."""
    if request.path.is_relative_to(ENGINE_TESTS) or "engine" in request.path.stem:
        from argrpo.engine import page_pool

        order = np.random.default_rng(0)
        monkeypatch.setattr(page_pool, "first_order", lambda n: order.permutation(n).tolist())


def _filled_with_nan(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_nan(*args: object, **options: object) -> Tensor:
        out = allocate(*args, **options)
        if out.is_floating_point():
            with torch.no_grad():
                out.fill_(torch.nan)
        return out

    return allocate_nan


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _check_interpreter() -> None:
    """Triton 3.6 reads a loop's end from an array of one number, which numpy 2.4 refuses."""
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton <= (3, 6) and numpy >= (2, 4):
        raise pytest.UsageError(
            f"numpy: expected below 2.4 for the interpreter of Triton {version('triton')}, got "
            f"{version('numpy')}; pip install 'numpy<2.4', or a newer Triton"
        )
