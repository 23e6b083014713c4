"""Installs argrpo: its metadata, its dependencies, and which folder holds which package.

The folders kernels/ and engine/ become argrpo.kernels and argrpo.engine here, because the bare
names belong to others (Hugging Face publishes a package named kernels that transformers probes).
CONTRIBUTING.md has the rules that follow from it and the reason for each dependency.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
HOMES = {"argrpo": "argrpo", "argrpo.kernels": "kernels", "argrpo.engine": "engine"}  # name: folder

packages = [
    name + sub
    for name, folder in HOMES.items()
    for sub in ("", *(f".{found}" for found in find_packages(folder)))
]

CORE = [
    # torch and torchvision are resolved together: a torchvision beside another build of torch fails
    # at import. No index and no build is pinned for the same reason.
    "torch>=2.11",
    "torchvision",
    "triton>=3.6",
    "numpy",
    "safetensors",
    "pillow",
    "jsonargparse[signatures]>=4.49",
    "rich",
    "tensorboard",
    "matplotlib",
    "transformers>=5.0",
    "huggingface_hub",
    "pyyaml",
    "open_clip_torch>=3.3",
    "ftfy",
    "timm",
    "nvtx",
    "scikit-learn",
]

EXTRAS = {
    "judges": ["httpx"],
    "text": ["sentencepiece", "datasets", "beautifulsoup4"],
    "iqa": ["lpips", "pyiqa"],
    "hpsv2": ["hpsv2"],
    "attention": ["flash-attn", "xformers"],
    "eval": ["torch-fidelity"],
    "track": ["wandb", "trackio"],
    "dev": [
        "argrpo[judges,text,iqa,eval]",  # what the tests of those extras import
        "pytest>=8.1",
        "pytest-benchmark",
        "hypothesis",
        "ruff",
        "mypy",
        "setuptools>=70.1",  # tests/test_packaging.py builds a wheel without build isolation
    ],
}


def version() -> str:
    """The one written version, read without importing the package (torch may not be there yet)."""
    text = (ROOT / "argrpo" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if found is None:
        raise ValueError('argrpo/__init__.py: expected a line __version__ = "...", found none')
    return found.group(1)


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="argrpo",
    version=version(),
    description="GRPO for autoregressive image models, on a rollout engine with its own kernels",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages,
    package_dir=HOMES,
    package_data={"argrpo": ["py.typed", "configs/*.yaml", "**/*.txt"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["argrpo=argrpo.cli:main"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
    ],
)
