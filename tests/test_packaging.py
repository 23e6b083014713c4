"""A wheel, installed where the repository is not: everything that a user needs came along."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOMES = {"argrpo": "argrpo", "argrpo/kernels": "kernels", "argrpo/engine": "engine"}
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that holds our wheel and sees this one's dependencies. Offline."""
    home = tmp_path_factory.mktemp("wheel")
    source = home / "source"
    for folder in HOMES.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=LEFT_OUT)
    for file in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-I", "-m", "pip"]
    offline = ["--no-index", "--no-deps", "--quiet"]
    _run(home, *pip, "wheel", *offline, "--no-build-isolation", "-w", str(home), str(source))
    (wheel,) = home.glob("argrpo-*.whl")

    fresh = home / "environment"
    venv.create(fresh, with_pip=False, symlinks=True)
    _run(home, *pip, "--python", str(fresh / "bin/python"), "install", *offline, str(wheel))
    # A .pth file adds one folder to the search. The .pth files in that folder are not read, so
    # the editable install of this repository, which is one of them, stays out of sight.
    (_packages(fresh) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return fresh


def test_a_wheel_holds_every_file_of_the_three_packages(environment: Path) -> None:
    wanted = {
        f"{home}/{path.relative_to(ROOT / folder)}"
        for home, folder in HOMES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packages = _packages(environment)
    assert {file for file in wanted if not (packages / file).is_file()} == set()


def test_kernels_and_engine_come_from_the_wheel_under_our_name_only(
    environment: Path, tmp_path: Path
) -> None:
    shown = _run(
        tmp_path,
        str(environment / "bin/python"),
        "-c",
        "import argrpo.kernels, argrpo.engine; from importlib.util import find_spec;"
        "print(*argrpo.kernels.__path__, *argrpo.engine.__path__);"
        "print(find_spec('kernels'), find_spec('engine'))",
    )
    packages = _packages(environment)
    assert shown.splitlines() == [
        f"{packages / 'argrpo/kernels'} {packages / 'argrpo/engine'}",
        "None None",
    ]


def test_presets_are_found_beside_the_code(environment: Path) -> None:
    configs = _packages(environment) / "argrpo/configs"
    assert "digits.yaml" in {path.name for path in configs.iterdir()}


def test_the_console_script_starts(environment: Path, tmp_path: Path) -> None:
    shown = _run(tmp_path, str(environment / "bin/argrpo"), "--help")
    for verb in ("demo", "train", "sample", "doctor", "report"):
        assert verb in shown


def _packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", vars={"base": str(environment)}))


def _run(folder: Path, *command: str) -> str:
    """Run a command in a folder that is not the repository; its output, or a failed test."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout
