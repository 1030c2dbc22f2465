"""What slow tests need outside Python (node, Chromium, libraries of the phone page), and skips without it.

`make runtimes` fetches the packages of node and optimum into .runtimes, `make web` the page's libraries.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from graph_twins import ASCII, SPECIALS, bpe_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from edgedisp import data
from edgedisp.bench.browser import find_browser
from edgedisp.commands.export import export_bundle
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import silent
from edgedisp.graph.runtime_layouts import GGUF, LAYOUTS
from edgedisp.models import save
from edgedisp.models.tiny_model import tiny_model

TOP = Path(__file__).resolve().parents[2]
WEB = TOP / "export" / "web"
NODE_MODULES = TOP / ".runtimes" / "node" / "node_modules"
OPTIMUM_PYTHON = TOP / ".runtimes" / "optimum" / "bin" / "python"
SLOW = TOP / "tests" / "slow"  # where the modules for node are


def chromium() -> str | None:
    """The browser that edgedisp would start."""
    try:
        return find_browser()
    except BadInput:
        return None


def _needs(is_there: bool, reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not is_there, reason=reason)


def _packages(*names: str) -> bool:
    return shutil.which("node") is not None and all((NODE_MODULES / name).is_dir() for name in names)


needs_node = _needs(
    _packages("@huggingface/transformers"), "needs node and @huggingface/transformers: make runtimes"
)
needs_chromium = _needs(chromium() is not None, "needs chromium: apt-get install chromium")
needs_playwright = _needs(_packages("playwright-core"), "needs node and playwright-core: make runtimes")
needs_web = _needs((WEB / "vendor").is_dir(), "needs the page's libraries: make web")
needs_optimum = _needs(
    any(OPTIMUM_PYTHON.parents[1].glob("lib/*/site-packages/optimum")), "needs optimum-onnx: make runtimes"
)


def output(command: list[str | Path], folder: Path, lines: str = "") -> str:
    """What a program prints that reads `lines`, away from this package and from every hub."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        command, input=lines, capture_output=True, text=True, cwd=folder, env=env, timeout=400
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def in_chromium(page: Path, models: Path) -> Any:
    """What in_chromium.mjs prints of the module `page`, with the bundles in `models` served."""
    command = ["node", SLOW / "in_chromium.mjs", str(chromium()), NODE_MODULES.resolve(), models, page]
    return json.loads(output(command, page.parent).splitlines()[-1])


def with_node_modules(folder: Path) -> Path:
    (folder / "node_modules").symlink_to(NODE_MODULES.resolve())
    return folder


def text_model(architecture: str, folder: Path) -> Path:
    """A tiny random model whose every token is text: runtimes differ in how they show other bytes."""
    texts = [document.text for document in data.synthetic_documents(120, seed=0)]
    model, _ = tiny_model(architecture, texts, seed=0, context=128)
    inner = bpe_tokenizer(texts, model.config.vocab_size, ASCII)
    if architecture == "gemma3_text":  # begins every text with a token
        marks = [(SPECIALS[0], 0)]
        inner.post_processor = processors.TemplateProcessing(f"{SPECIALS[0]} $A", special_tokens=marks)
    assert inner.get_vocab_size() == model.config.vocab_size
    names = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[2], "pad_token": SPECIALS[2]}
    save(model, PreTrainedTokenizerFast(tokenizer_object=inner, **names), folder)
    return folder


ONNX = [name for name in LAYOUTS if name != GGUF]


@dataclass(frozen=True)
class Bundle:
    """A bundle in all layouts of ONNX, and the lines of its manifest that open it, by layout."""

    folder: Path
    load: dict[str, str]


def export_all_layouts(source: Path, precision: str, root: Path, for_browser: bool) -> Bundle:
    """A model folder as root/bundle, for a browser or for a small board."""
    architecture = "wasm32" if for_browser else "arm64"
    profile: dict[str, Any] = {"name": "box", "description": "a box", "architecture": architecture}
    profile |= {"context": 128, "threads": 1, "precision": precision, "layouts": ONNX}
    if for_browser:
        profile["quantize"] = {"accuracy_level": 0}
    (root / "box.yaml").write_text(json.dumps(profile))  # JSON is YAML
    export_bundle(source, str(root / "box.yaml"), root / "bundle", silent)
    manifest = json.loads((root / "bundle" / "manifest.json").read_text())
    return Bundle(root / "bundle", {name: entry["load"] for name, entry in manifest["layouts"].items()})
