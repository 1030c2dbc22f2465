"""The runtime of each layout opens it with the lines that the manifest shows.

transformers.js runs in node and in headless Chromium, optimum in a second environment (it needs
transformers 4); `make runtimes` puts all but Chromium under `.runtimes`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from graph_twins import ASCII, SPECIALS, bpe_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from edgedisp import data
from edgedisp.commands.export import export_bundle
from edgedisp.core.progress import silent
from edgedisp.graph.runtime_layouts import GENAI, LAYOUTS, OPTIMUM, WEB
from edgedisp.graph.session import OnnxModel
from edgedisp.models import load_tokenizer, save
from edgedisp.models.tiny_model import tiny_model

RUNTIMES = Path(__file__).resolve().parents[2] / ".runtimes"
NODE_MODULES = RUNTIMES / "node" / "node_modules"
OPTIMUM_PYTHON = RUNTIMES / "optimum" / "bin" / "python"
TEXT = "the water of the river"
NEW_TOKENS = 48  # as in the lines of the manifest
MODELS = ["llama-int4", "llama-fp32", "gpt2-int8", "gemma3_text-int4", "qwen3-int4"]
# For a browser the products are unfolded and multiply in fp32, so what is expected is computed in fp32, too.
BROWSER_MODELS = ["llama-int4-browser", "gpt2-int8-browser", "gemma3_text-int4-browser"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
IN_CHROMIUM = Path(__file__).resolve().parent / "in_chromium.mjs"
SECONDS = 170  # transformers.js waits forever for a file that is not there

node = pytest.mark.skipif(
    shutil.which("node") is None or not (NODE_MODULES / "@huggingface" / "transformers").is_dir(),
    reason="needs node and @huggingface/transformers: make runtimes",
)
browser = pytest.mark.skipif(
    CHROMIUM is None or not (NODE_MODULES / "playwright-core").is_dir(),
    reason="needs chromium (apt-get install chromium), and playwright-core: make runtimes",
)
optimum = pytest.mark.skipif(
    not any(OPTIMUM_PYTHON.parent.parent.glob("lib/*/site-packages/optimum")),
    reason="needs optimum-onnx in a second environment: make runtimes",
)


@dataclass(frozen=True)
class Bundle:
    """A bundle in all layouts, how its runtimes open it, and what greedy decoding must say."""

    folder: Path
    load: dict[str, str]
    text: str


Bundles = Callable[[str], Bundle]


def ascii_model(architecture: str, folder: Path) -> Path:
    """A tiny random model whose every token is text: runtimes differ in how they show other bytes."""
    texts = [document.text for document in data.synthetic_documents(120, seed=0)]
    model, _ = tiny_model(architecture, texts, seed=0, context=128)
    inner = bpe_tokenizer(texts, model.config.vocab_size, ASCII)
    if architecture == "gemma3_text":  # begins every text with a token
        marks = [(SPECIALS[0], 0)]
        inner.post_processor = processors.TemplateProcessing(f"{SPECIALS[0]} $A", special_tokens=marks)
    assert inner.get_vocab_size() == model.config.vocab_size
    names = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[2], "pad_token": SPECIALS[2]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    save(model, tokenizer, folder)
    return folder


def export(source: Path, precision: str, root: Path, for_browser: bool) -> Bundle:
    """The model folder as a bundle in all layouts, and its greedy text by onnxruntime without any of them."""
    profile, architecture = root / "box.yaml", "wasm32" if for_browser else "arm64"
    keys: dict[str, Any] = {"name": "box", "description": "a box", "architecture": architecture}
    keys |= {"context": 128, "threads": 1, "precision": precision, "layouts": LAYOUTS}
    if for_browser:
        keys["quantize"] = {"accuracy_level": 0}
    profile.write_text(json.dumps(keys))  # JSON is YAML
    out = root / "bundle"
    export_bundle(source, str(profile), out, silent)
    manifest = json.loads((out / "manifest.json").read_text())
    load = {name: entry["load"] for name, entry in manifest["layouts"].items()}
    tokenizer = load_tokenizer(out)
    ids = tokenizer(TEXT)["input_ids"]
    model = OnnxModel(out, 1)
    new = model.greedy(ids, NEW_TOKENS, model.end_ids)
    return Bundle(out, load, tokenizer.decode(ids + new, skip_special_tokens=True))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """`llama-int4`, `llama-int4-browser` and the like -> its bundle, made when it is first asked for."""

    @cache
    def bundle(name: str) -> Bundle:
        family, precision, *rest = name.split("-")
        root = tmp_path_factory.mktemp(name)
        return export(ascii_model(family, root / "model"), precision, root, for_browser=bool(rest))

    return bundle


def printed_by(command: list[str | Path], folder: Path) -> str:
    """What a runtime prints, away from this package and from every hub."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | offline
    process = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=SECONDS)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def check_in_python(bundle: Bundle, layout: str, python: str | Path, folder: Path) -> None:
    variables = f"folder, text = {str(bundle.folder)!r}, {TEXT!r}\n"
    check_same(printed_by([python, "-c", variables + bundle.load[layout]], folder), bundle)


def check_same(printed: str, bundle: Bundle) -> None:
    """Equal but for spaces and special tokens, which some runtimes print."""
    for token in json.loads((bundle.folder / "tokenizer.json").read_text())["added_tokens"]:
        printed = printed.replace(token["content"], "")
    assert printed.split() == bundle.text.split()


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_genai_opens_its_layout(name: str, bundles: Bundles, tmp_path: Path) -> None:
    check_in_python(bundles(name), GENAI, sys.executable, tmp_path)


@optimum
@pytest.mark.parametrize("name", ["llama-int4", "gpt2-int8"])  # its start takes ten seconds
def test_optimum_opens_its_layout(name: str, bundles: Bundles, tmp_path: Path) -> None:
    check_in_python(bundles(name), OPTIMUM, OPTIMUM_PYTHON, tmp_path)


def lines(bundle: Bundle, parent: str) -> str:
    """The manifest's lines, with the words that are the reader's to fill in."""
    variables = {"parent": parent, "name": bundle.folder.name, "text": TEXT}
    constants = [f"const {key} = {json.dumps(value)};" for key, value in variables.items()]
    return "\n".join([*constants, bundle.load[WEB]])


@node
@pytest.mark.parametrize("name", [*MODELS, *BROWSER_MODELS])
def test_transformers_js_opens_its_layout(name: str, bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles(name)
    (tmp_path / "node_modules").symlink_to(NODE_MODULES.resolve())
    (tmp_path / "load.mjs").write_text(lines(bundle, f"{bundle.folder.parent}/"))
    check_same(printed_by(["node", tmp_path / "load.mjs"], tmp_path), bundle)


@node
@browser
@pytest.mark.parametrize("name", BROWSER_MODELS)
def test_the_same_folder_opens_in_a_browser(name: str, bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles(name)
    page = tmp_path / "page.mjs"
    page.write_text(f"{lines(bundle, '/models/')}\nexport default answer.generated_text;\n")
    command = ["node", IN_CHROMIUM, str(CHROMIUM), NODE_MODULES.resolve(), bundle.folder.parent, page]
    result = json.loads(printed_by(command, tmp_path).splitlines()[-1])
    check_same(result["result"], bundle)
    assert sum(path.endswith("_data") for path in result["served"]) == 1
