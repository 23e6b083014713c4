"""`argrpo doctor`: what is installed, what this machine has, what will be used, and why."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.text import Text

from argrpo.environment import (
    CORE_PACKAGES,
    OPTIONAL_PACKAGES,
    cpu_features,
    cpu_model,
    environment,
    free_disk_bytes,
    free_memory_bytes,
    usable_cpus,
    version,
)

_GB = 1e9
_DEMO_MEMORY_GB = 4  # the stated bound of `argrpo demo`


class Finding(NamedTuple):
    """One line of the report."""

    section: str
    name: str
    value: str
    is_good: bool = True


def examine(work_dir: Path, cache_dir: Path) -> list[Finding]:
    """Everything that is worth knowing before a run.

    Args:
        work_dir: where runs are going to be written.
        cache_dir: where the embedded models are kept.
    """
    return [
        *_versions(),
        *_gpu(),
        *_cpu(),
        *_room(work_dir, cache_dir),
        *_extras(),
        *_decisions(),
    ]


def show(findings: list[Finding], console: Console) -> None:
    """Print findings, section by section; what is wrong is marked."""
    for section in dict.fromkeys(finding.section for finding in findings):
        console.print(Text(section, style="bold"))
        found = [finding for finding in findings if finding.section == section]
        width = max(len(finding.name) for finding in found)
        for finding in found:
            mark = ("  ", "") if finding.is_good else ("! ", "bold red")
            line = Text.assemble(mark, f"{finding.name:<{width}}  {finding.value}")
            console.print(line, soft_wrap=True)
        console.print()


def _versions() -> Iterator[Finding]:
    facts = environment()
    for name in ("argrpo", "commit", "python", "system", *CORE_PACKAGES):
        is_there = facts[name] != "missing"
        value = facts[name] if is_there else "missing; pip install argrpo brings it"
        yield Finding("versions", name, value, is_there)
    # A torchvision beside another build of torch is installed and still fails at import.
    if version("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, AttributeError) as error:
            remedy = "reinstall torch and torchvision together"
            yield Finding("versions", "torchvision", f"does not import ({error}); {remedy}", False)


def _gpu() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        build = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
        yield Finding("GPU", "devices", ", ".join(filter(None, ["none found", build])))
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield Finding(
            "GPU",
            f"device {index}",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{free / _GB:.0f} of {total / _GB:.0f} GB free",
            properties.major >= 8,
        )
    yield Finding("GPU", "CUDA", str(torch.version.cuda))


def _cpu() -> Iterator[Finding]:
    yield Finding("CPU", "model", cpu_model())
    yield Finding("CPU", "cores", f"{usable_cpus()} usable, torch uses {torch.get_num_threads()}")
    yield Finding("CPU", "features", ", ".join(cpu_features()) or "none that matter here")


def _room(work_dir: Path, cache_dir: Path) -> Iterator[Finding]:
    memory = free_memory_bytes() / _GB
    yield Finding("room", "memory", f"{memory:.1f} GB free", memory >= _DEMO_MEMORY_GB)
    for name, path in (("runs go below", work_dir), ("embedded models", cache_dir)):
        free = free_disk_bytes(path) / _GB
        yield Finding("room", name, f"{path}, {free:.1f} GB free", free >= 1)


def _extras() -> Iterator[Finding]:
    for extra, packages in OPTIONAL_PACKAGES.items():
        there = [f"{name} {version(name)}" for name in packages if version(name)]
        lacking = [name for name in packages if not version(name)]
        words = ", ".join([*there, *(f"{name} not installed" for name in lacking)])
        remedy = f"  (pip install 'argrpo[{extra}]')" if lacking else ""
        yield Finding("optional packages", extra, words + remedy)


def _decisions() -> Iterator[Finding]:
    section = "what will be used"
    if torch.cuda.is_available():
        yield Finding(section, "device", "cuda: a GPU was found")
        yield Finding(section, "kernels", "Triton, compiled for this GPU at first use")
        yield Finding(section, "dtype", "--policy.dtype bfloat16 is the fast one here")
        yield Finding(section, "engine", "decode steps replayed as CUDA graphs over a paged cache")
    else:
        yield Finding(section, "device", "cpu: no CUDA GPU was found")
        yield Finding(section, "kernels", "plain PyTorch references: Triton needs a GPU")
        yield Finding(section, "dtype", _cpu_dtype())
        waves = "plain PyTorch in lockstep waves; over pages for a taming policy"
        yield Finding(section, "engine", waves)


def _cpu_dtype() -> str:
    features = cpu_features()
    if "amx_bf16" in features or "avx512_bf16" in features:
        found = "amx_bf16" if "amx_bf16" in features else "avx512_bf16"
        return f"float32 is the default; --policy.dtype bfloat16 may be faster: {found} is there"
    return "float32: this CPU multiplies no bf16 matrices in hardware"
