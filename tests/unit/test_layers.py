"""The shape of the code: which package may import which, no cycles, sizes. docs/architecture.md draws it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from edgedisp import PUBLIC

TOP = Path(__file__).resolve().parents[2]
PACKAGE = TOP / "edgedisp"

# A package imports packages of lower layers; `edgedisp` itself (version, lazy names) is for everybody.
LAYERS = {
    "core": 0,
    "recipe": 1, "data": 1, "models": 1, "dispersion": 1,
    "train": 2, "quantize": 2, "graph": 2, "evaluate": 2, "bench": 2, "report": 2,
    "pipeline": 3,
    "commands": 4,
    "cli": 5,
    "__main__": 6,
}  # fmt: skip

# Packages of one layer that may import one another, each arrow where it is truly needed.
SIBLINGS = {("quantize", "graph"), ("data", "recipe"), ("models", "recipe")}

MODULE_LINES, FUNCTION_LINES, PARAMETERS = 350, 60, 6
# Ceilings of edgedisp with the runner, tests and benchmarks: 23,030, 350 for llama.cpp's file, 160 for it
# as a device, 25 for the share of the memory's bandwidth.
PACKAGE_LINES, PACKAGE_MODULES, TEST_LINES, BENCHMARK_LINES = 23_565, 130, 17_240, 1_700
LONGER = {"export/runner/runner.py"}  # copied to devices as one file

MODULES = sorted(PACKAGE.rglob("*.py"))
RUNNER = sorted((TOP / "export" / "runner").glob("*.py"))
TESTS = sorted((TOP / "tests").rglob("*.py"))
BENCHMARKS = sorted((TOP / "benchmarks").glob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def name_of(path: Path) -> str:
    """`edgedisp.graph.session` for edgedisp/graph/session.py."""
    parts = path.relative_to(TOP).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, also inside functions; not those for type checkers alone.

    `from edgedisp.graph import session` is edgedisp.graph.session; a lazy name of the root is its module.
    """
    for node in statements(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in NAMES:
                    yield full
                else:
                    yield PUBLIC.get(alias.name, "edgedisp") if node.module == "edgedisp" else node.module


NAMES = {name_of(path) for path in MODULES}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from statements(child)


def inner_imports(path: Path) -> set[str]:
    return {module for module in imports(path) if module.startswith("edgedisp.")}


def test_packages_import_only_packages_of_lower_layers() -> None:
    wrong = set()
    for path in MODULES:
        if path == PACKAGE / "__init__.py":
            continue
        package = package_of(name_of(path))
        for module in inner_imports(path):
            other = package_of(module)
            if other != package and LAYERS[other] >= LAYERS[package] and (package, other) not in SIBLINGS:
                wrong.add(f"{path.relative_to(TOP)} imports {module}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_import_cycle_between_modules() -> None:
    arrows = {name_of(path): inner_imports(path) - {name_of(path)} for path in MODULES}
    while free := [name for name, targets in arrows.items() if not targets & set(arrows)]:
        for name in free:
            del arrows[name]
    # What remains lies on a cycle or leads to one; a package's __init__ is entered with each of its modules.
    assert not arrows, {name: sorted(targets & set(arrows)) for name, targets in arrows.items()}


@pytest.mark.parametrize(
    ("paths", "allowed", "packages"),
    [
        (sorted((PACKAGE / "dispersion").glob("*.py")), {"torch", "edgedisp"}, {"dispersion", "core"}),
        (RUNNER, {"numpy", "onnxruntime"}, set()),
    ],
    ids=["dispersion", "runner"],
)
def test_some_code_needs_few_libraries(paths: list[Path], allowed: set[str], packages: set[str]) -> None:
    for path in paths:
        libraries = {module.split(".")[0] for module in imports(path)}
        assert libraries <= {*allowed, *sys.stdlib_module_names}, path
        assert {package_of(module) for module in inner_imports(path)} <= packages, path


def test_names_say_what_they_hold() -> None:
    """A participle or a pronoun is no name: `results`, `rows`, `path` say more than `found`."""
    forbidden = {"one", "found", "held", "own", "made", "kept", "told", "asked", "said", "chosen", "ends"}
    wrong = {
        f"{path.relative_to(TOP)}:{node.lineno}: {name}"  # type: ignore[attr-defined]
        for path in [*MODULES, *RUNNER, *TESTS, *BENCHMARKS]
        for node in ast.walk(tree(path))
        for name in defined(node)
        if name.strip("_") in forbidden
    }
    assert not wrong, "\n".join(sorted(wrong))


def defined(node: ast.AST) -> list[str]:
    """The name that a node gives to a variable, an argument, a function or a class."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.id if isinstance(node, ast.Name) else node.attr]
    return []


def test_tests_import_from_helpers_and_never_from_one_another() -> None:
    for path in TESTS:
        assert not [name for name in imports(path) if name.startswith(("test_", "conftest"))], path


# ---------------------------------------------------------------- sizes


def test_package_tests_and_benchmarks_stay_within_their_budgets() -> None:
    product = [*MODULES, *RUNNER]
    assert lines(product) <= PACKAGE_LINES
    assert len(product) <= PACKAGE_MODULES
    assert lines(TESTS) <= TEST_LINES
    assert lines(BENCHMARKS) <= BENCHMARK_LINES


@pytest.mark.parametrize("path", [*MODULES, *RUNNER], ids=lambda path: str(path.relative_to(TOP)))
def test_a_module_fits_on_a_few_screens_and_its_functions_on_one(path: Path) -> None:
    relative = str(path.relative_to(TOP))
    assert lines([path]) <= MODULE_LINES or relative in LONGER
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            assert size <= FUNCTION_LINES, f"{relative}: {node.name} has {size} lines"
            # Options of a command are its interface; Typer reads them from the function's parameters.
            if relative.startswith("edgedisp/cli/"):
                continue
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            assert count <= PARAMETERS, f"{relative}: {node.name} has {count} parameters"
