"""Who may import whom (docs/architecture.md), over every import, also those inside functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from edgedisp import PUBLIC

PACKAGE = Path(__file__).resolve().parents[2] / "edgedisp"

# Layer of each room; a room may import rooms of lower layers only. The package root is for everybody.
LAYERS = {
    "core": 0,
    "recipe": 1, "data": 1, "models": 1, "dispersion": 1,
    "train": 2, "quantize": 2, "graph": 2, "evaluate": 2, "bench": 2, "report": 2,
    "device_results": 3,
    "pipeline": 4,
    "follow": 5, "lm_eval_models": 5,
    "commands": 6,
    "cli": 7,
    "__main__": 8,
}  # fmt: skip

HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "scipy", "matplotlib", "lm_eval", "datasets", "peft"}


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Rooms of edgedisp that a file imports, wherever the statement stands."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("edgedisp.")}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"{path}:{node.lineno}: relative import; write the full path")
            if node.module == "edgedisp":
                rooms |= {alias.name for alias in node.names if alias.name in LAYERS}
                # By the root's name it is still the room's.
                rooms |= {PUBLIC[alias.name].split(".")[1] for alias in node.names if alias.name in PUBLIC}
            elif node.module and node.module.startswith("edgedisp."):
                rooms.add(node.module.split(".")[1])
    return rooms


def files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


# Packages of one layer that may import one another, each where it truly needs it.
SIBLINGS: set[tuple[str, str]] = {("quantize", "graph")}


def test_every_file_belongs_to_a_package_with_a_layer() -> None:
    assert {room_of(path) for path in files()} <= set(LAYERS)


def test_packages_import_only_packages_of_lower_layers() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {room}"
        for path in files()
        for room in imported(path) - {room_of(path)}
        if LAYERS[room] >= LAYERS[room_of(path)] and (room_of(path), room) not in SIBLINGS
    ]
    assert not wrong, "\n".join(wrong)


def test_the_dispersion_room_needs_torch_alone() -> None:
    allowed = {"torch", "edgedisp", *sys.stdlib_module_names}
    for path in (PACKAGE / "dispersion").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert {module.split(".")[0] for module in modules} <= allowed, path
        assert imported(path) <= {"dispersion", "core"}


def test_the_runner_needs_numpy_and_onnxruntime_alone() -> None:
    allowed = {"numpy", "onnxruntime", *sys.stdlib_module_names}
    for path in (PACKAGE.parent / "export" / "runner").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] in allowed


def test_light_modules_load_nothing_heavy() -> None:
    light = ("cli", "recipe", "core.stage_folder", "core.progress", "pipeline", "commands.plan", "report")
    names = ", ".join(f"edgedisp.{name}" for name in light)
    script = f"import sys, {names}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_what_does_not_train_stays_clear_of_the_trainer() -> None:
    script = """
import sys
from edgedisp.pipeline import bundles, measure, package, prepare
print("transformers.trainer" in sys.modules, "peft" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_names_at_the_root_are_there_and_loaded_when_asked_for() -> None:
    script = f"""
import sys, edgedisp
print("torch" in sys.modules)
for name, module in {PUBLIC!r}.items():
    assert getattr(edgedisp, name) is getattr(sys.modules[module], name)
print(hasattr(edgedisp, "Dispersion"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_no_assert_and_no_print_in_the_package() -> None:
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}"
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            assert not named, f"{path}: print"
