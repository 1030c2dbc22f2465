"""What benchmarks share: the recipe wikipedia's model and text, and the JSON file of a result.

`results/<script>.json` has `machine`, `versions`, `commit`, `command`, `figures` (name: number) and `rows`.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from edgedisp import data, models
from edgedisp.bench.system import describe, installed_version
from edgedisp.core.files import data_folder, git_commit
from edgedisp.core.progress import silent
from edgedisp.pipeline.prepare import read_documents
from edgedisp.recipe import Recipe, load

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "peft")


def write(script: str, figures: dict[str, Any], rows: list[Any], *, suffix: str = "", **more: Any) -> None:
    """Write results/<script><suffix>.json. Paths in the command are shown from the top of the checkout."""
    words = [word.removeprefix(f"{RESULTS.parent.parent}/") for word in sys.argv[1:]]
    result = {
        "machine": {key: value for key, value in describe().items() if key != "packages"},
        "versions": {name: installed_version(name) for name in PACKAGES},
        "commit": git_commit(),
        "command": shlex.join(["python", f"benchmarks/{script}.py", *words]),
        "figures": figures,
        "rows": rows,
    }
    path = RESULTS / f"{script}{suffix}.json"
    path.write_text(json.dumps({**result, **more}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote results/{path.name}")


def wikipedia(settings: Sequence[str] = ()) -> Recipe:
    return load(data_folder("recipes") / "wikipedia.yaml", settings)


def wikipedia_base() -> tuple[Any, Any]:
    """Wikipedia's base, SmolLM2-135M-Instruct in float32, and its tokenizer."""
    model = wikipedia().model
    return models.open_base(data.fetch(model.base, sha256=model.sha256))


def wikipedia_blocks(tokenizer: Any, context: int, blocks: int) -> np.ndarray:
    """Packed blocks `(blocks, context)` of the recipe wikipedia's text."""
    recipe = wikipedia()
    documents = read_documents(recipe.data, False, silent)
    encode = models.document_encoder(tokenizer)
    return data.training_blocks(documents, encode, context, blocks, recipe.seed)[0]


def median_and_quartiles(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return median(ordered), ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]
