"""Facts about the machine and the installed versions, as `doctor` and each run folder have them."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import argrpo

CORE_PACKAGES = (
    "torch",
    "triton",
    "torchvision",
    "numpy",
    "safetensors",
    "pillow",
    "jsonargparse",
    "rich",
    "tensorboard",
    "transformers",
    "open_clip_torch",
    "scikit-learn",
    "nvtx",
)

OPTIONAL_PACKAGES = {
    "judges": ("httpx",),
    "text": ("sentencepiece", "datasets"),
    "iqa": ("lpips", "pyiqa"),
    "hpsv2": ("hpsv2",),
    "attention": ("flash-attn", "xformers"),
    "eval": ("torch-fidelity",),
    "track": ("wandb", "trackio"),
}
"""Distributions by the extra that brings them: pip install 'argrpo[track]'."""

# Of the many flags of a CPU, those that decide which matrix products a fast bf16 or fp32 path has.
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def environment() -> dict[str, str]:
    """Versions and hardware in words, for a file that is read long after the run."""
    facts = {
        "argrpo": argrpo.__version__,
        "commit": commit() or "not a git checkout",
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": f"{cpu_model()}, {usable_cpus()} usable cores, {torch.get_num_threads()} threads",
        "cpu features": ", ".join(cpu_features()) or "none that matter here",
        "gpu": ", ".join(gpu_names()) or "none",
        "cuda": str(torch.version.cuda or "none"),
    }
    return facts | {name: version(name) or "missing" for name in CORE_PACKAGES}


def version(distribution: str) -> str | None:
    """Installed version of a distribution; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that runs, with a + if files differ from it; None outside a git checkout."""
    root = Path(argrpo.__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def gpu_names() -> list[str]:
    """Names of the CUDA devices that torch sees."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def cpu_model() -> str:
    return _cpuinfo("model name") or platform.machine()


def cpu_features() -> list[str]:
    """Those of `CPU_FEATURES` that this CPU has."""
    flags = set((_cpuinfo("flags") or "").split())
    return [feature for feature in CPU_FEATURES if feature in flags]


def usable_cpus() -> int:
    """Cores this process may run on, which a container can make fewer than there are."""
    return len(os.sched_getaffinity(0))


def free_memory_bytes() -> int:
    """Main memory that can still be taken: of the machine, or what a container allows."""
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) for line in meminfo if line.startswith("MemAvailable"))
    return min([available * 1024, *_container_memory_bytes()])


def free_disk_bytes(path: Path) -> int:
    """Free disk where a path lies or would lie."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _container_memory_bytes() -> list[int]:
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return []
    return [] if limit == "max" else [max(0, int(limit) - used)]


def _cpuinfo(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in found if name.strip() == key), None)


def _git(root: Path, *words: str) -> str | None:
    command = ["git", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
