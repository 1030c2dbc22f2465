"""What a fresh process imports."""

from __future__ import annotations

import subprocess
import sys

from edgedisp import PUBLIC

HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "scipy", "matplotlib", "lm_eval", "datasets", "peft"}
LIGHT = (
    "bench.system",
    "cli",
    "commands.pilot",
    "recipe",
    "core.stage_folder",
    "core.progress",
    "pipeline.build_plan",
    "report",
)


def printed_by(script: str) -> list[str]:
    """The words that a fresh process prints."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_planning_and_help_load_nothing_heavy() -> None:
    imported = ", ".join(f"edgedisp.{name}" for name in LIGHT)
    assert printed_by(f"import sys, {imported}; print(*({HEAVY!r} & set(sys.modules)))") == []


def test_the_public_names_are_loaded_when_asked_for() -> None:
    script = f"""
import sys, edgedisp
print("torch" in sys.modules)
for name, module in {PUBLIC!r}.items():
    assert getattr(edgedisp, name) is getattr(sys.modules[module], name)
print(hasattr(edgedisp, "Dispersion"))
"""
    assert printed_by(script) == ["False", "False"]
