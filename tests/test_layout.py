"""The house rules that a machine can keep: who imports whom, where packages live, what files are
called. CONTRIBUTING.md gives the reasons."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import argrpo
import argrpo.engine
import argrpo.kernels

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "engine", "argrpo", "bench", "profiles", "tests")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
PACKAGED = [path for path in FILES if path.relative_to(ROOT).parts[0] in FOLDERS[:3]]

TRITON_STACK = {"torch", "triton"}
MAY_IMPORT = {  # besides the standard library
    "kernels": {*TRITON_STACK, "argrpo.kernels"},
    "engine": {*TRITON_STACK, "argrpo.kernels", "argrpo.engine"},
}
NEVER_BARE = {"kernels", "engine", "bench", "profiles", "tests"}

# What is not there on a machine that only runs kernels and the engine.
BLOCKED = ["jsonargparse", "nvtx", "open_clip", "transformers", "sklearn", "rich", "safetensors"]


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_kernels_and_engine_import_only_what_stands_below_them(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | sys.stdlib_module_names
    wrong = [
        f"{place} imports {module}"
        for path in FILES
        if path.is_relative_to(ROOT / folder)
        for place, module in _imports(path)
        if not any(module == name or module.startswith(f"{name}.") for name in allowed)
    ]
    assert not wrong


def test_the_package_never_imports_benches_profiles_or_tests() -> None:
    wrong = [
        f"{place} imports {module}"
        for path in PACKAGED
        for place, module in _imports(path)
        if module.split(".")[0] in NEVER_BARE
    ]
    assert not wrong


def test_nothing_imports_relatively() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert not wrong


def test_the_mapped_packages_live_in_their_top_level_folders() -> None:
    assert list(argrpo.kernels.__path__) == [str(ROOT / "kernels")]
    assert list(argrpo.engine.__path__) == [str(ROOT / "engine")]


@pytest.mark.parametrize("folder", ["kernels", "engine"])
def test_a_mapped_folder_does_nothing_when_imported_by_accident(folder: str) -> None:
    body = ast.parse((ROOT / folder / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr]
    assert ast.get_docstring(ast.Module(body=body, type_ignores=[]))


def test_no_file_is_called_utils_or_hides_the_standard_library() -> None:
    # A script's own folder comes first on sys.path, so bench/queue.py would answer to `queue`.
    taken = {"utils", "kernels", "engine", *sys.stdlib_module_names}
    wrong = [path.relative_to(ROOT) for path in FILES if path.stem in taken]
    assert not [path for path in wrong if path.name != "__init__.py"]


def test_tests_are_no_package_and_only_one_conftest_exists() -> None:
    # tests/kernels/__init__.py would register a module named `kernels`.
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert [path for path in FILES if path.name == "conftest.py"] == [ROOT / "tests/conftest.py"]


def test_every_function_of_the_packages_is_annotated() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        for path in PACKAGED
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        and not _is_triton(function)
        and not _is_annotated(function)
    ]
    assert not wrong


@pytest.mark.parametrize("name", argrpo.__all__)
def test_every_public_name_resolves_to_what_its_file_defines(name: str) -> None:
    assert getattr(argrpo, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error_that_says_it() -> None:
    with pytest.raises(AttributeError, match="'argrpo' has no attribute 'load_polcy'"):
        argrpo.load_polcy  # noqa: B018


def test_kernels_and_engine_load_where_the_trainer_cannot() -> None:
    modules = [
        f"argrpo.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
        for path in PACKAGED
        if path.relative_to(ROOT).parts[0] in MAY_IMPORT and path.name != "__init__.py"
    ]
    done = _run(
        f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None  # importing it now raises ImportError
from importlib import import_module
for name in {modules}:
    import_module(name)
above = [name for name in sys.modules if name.startswith("argrpo.")]
print(*(name for name in above if name.split(".")[1] not in ("kernels", "engine")))
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_transformers_looking_for_the_package_kernels_does_not_disturb_us() -> None:
    # From the root, as in a notebook: our folder then does answer to the name `kernels`.
    done = _run(
        """
import transformers.integrations.hub_kernels
from transformers.utils.import_utils import is_kernels_available
import argrpo.kernels.rmsnorm
print(is_kernels_available(), argrpo.kernels.rmsnorm.__name__)
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "argrpo.kernels.rmsnorm"]


def _run(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the repository's root, with the root on sys.path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def _imports(path: Path) -> Iterator[tuple[str, str]]:
    """(file:line, dotted module) of every absolute import, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules = [node.module]
        else:
            continue
        for module in modules:
            yield f"{path.relative_to(ROOT)}:{node.lineno}", module


def _is_triton(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def _is_annotated(function: ast.FunctionDef) -> bool:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
    bare = [argument.arg for argument in named if argument.annotation is None]
    return function.returns is not None and set(bare) <= {"self", "cls", "ctx"}
