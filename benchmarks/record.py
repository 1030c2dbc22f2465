"""What benchmarks share: the model they train, and the JSON that keeps a figure together with its origin.

`results/<script>.json` holds `machine`, `versions`, `commit`, `command`, `figures` (name: number) and `rows`.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from edgedisp import data, models
from edgedisp.bench.system import describe, installed_version
from edgedisp.core.files import git_commit
from edgedisp.core.paths import data_folder
from edgedisp.core.progress import silent
from edgedisp.pipeline.prepare import read_documents
from edgedisp.recipe import load

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "peft")


def write(script: str, figures: dict[str, float], rows: list[dict[str, Any]], **more: Any) -> None:
    """Write results/<script>.json."""
    machine = {key: value for key, value in describe().items() if key != "packages"}
    result = {
        "machine": machine,
        "versions": {name: installed_version(name) for name in PACKAGES},
        "commit": git_commit(),
        "command": shlex.join(["python", f"benchmarks/{script}.py", *map(_from_the_top, sys.argv[1:])]),
        "figures": figures,
        "rows": rows,
        **more,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{script}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote results/{path.name}")


def _from_the_top(argument: str) -> str:
    """A path within the checkout as seen from its top: what lies above is this machine's alone."""
    return argument.removeprefix(f"{RESULTS.parent.parent}/")


def quickstart_base() -> tuple[Any, Any]:
    """The quickstart's base, SmolLM2-135M-Instruct in float32, and its tokenizer."""
    recipe = load(data_folder("recipes") / "quickstart.yaml")
    where = data.fetch(recipe.model.base, sha256=recipe.model.sha256)
    return models.open_base(where)


def quickstart_blocks(tokenizer: Any, context: int, blocks: int) -> np.ndarray:
    """Packed blocks `(blocks, context)` of the quickstart's text."""
    recipe = load(data_folder("recipes") / "quickstart.yaml")
    documents = read_documents(recipe.data, False, silent)
    encode = models.document_encoder(tokenizer)
    return data.training_blocks(documents, encode, context, blocks, recipe.seed)[0]


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median and the quartiles around it."""
    ordered = sorted(values)
    return median(ordered), ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
