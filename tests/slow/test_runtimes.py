"""The runtime of each layout opens it with the lines that the manifest shows.

transformers.js runs in node and in Chromium, optimum in an environment of its own (it needs transformers 4).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from browsers import (
    OPTIMUM_PYTHON,
    Bundle,
    export_all_layouts,
    in_chromium,
    needs_chromium,
    needs_node,
    needs_optimum,
    needs_playwright,
    output,
    text_model,
    with_node_modules,
)

from edgedisp.graph.runtime_layouts import GENAI, OPTIMUM, WEB
from edgedisp.graph.session import OnnxModel
from edgedisp.models import load_tokenizer

TEXT = "the water of the river"
NEW_TOKENS = 48  # as in the lines of the manifest
MODELS = ["llama-int4", "llama-fp32", "gpt2-int8", "gemma3_text-int4", "qwen3-int4"]
# For a browser the products are unfolded and multiply in fp32, so what is expected is computed in fp32, too.
BROWSER_MODELS = ["llama-int4-browser", "gpt2-int8-browser", "gemma3_text-int4-browser"]
Bundles = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """`llama-int4`, `llama-int4-browser` and the like -> its bundle, made when it is first asked for."""

    @cache
    def bundle(name: str) -> Bundle:
        family, precision, *rest = name.split("-")
        root = tmp_path_factory.mktemp(name)
        return export_all_layouts(text_model(family, root / "model"), precision, root, for_browser=bool(rest))

    return bundle


def check_in_python(bundle: Bundle, layout: str, python: str | Path, folder: Path) -> None:
    variables = f"folder, text = {str(bundle.folder)!r}, {TEXT!r}\n"
    check_text(output([python, "-c", variables + bundle.load[layout]], folder), bundle)


def check_text(printed: str, bundle: Bundle) -> None:
    """Equal to onnxruntime's greedy text, but for spaces and special tokens, which some runtimes print."""
    tokenizer, model = load_tokenizer(bundle.folder), OnnxModel(bundle.folder, 1)
    ids = tokenizer(TEXT)["input_ids"]
    expected = tokenizer.decode(ids + model.greedy(ids, NEW_TOKENS, model.end_ids), skip_special_tokens=True)
    for token in tokenizer.added_tokens_encoder:
        printed = printed.replace(token, "")
    assert printed.split() == expected.split()


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_genai_opens_its_layout(name: str, bundles: Bundles, tmp_path: Path) -> None:
    check_in_python(bundles(name), GENAI, sys.executable, tmp_path)


@needs_optimum
@pytest.mark.parametrize("name", ["llama-int4", "gpt2-int8"])  # its start takes ten seconds
def test_optimum_opens_its_layout(name: str, bundles: Bundles, tmp_path: Path) -> None:
    check_in_python(bundles(name), OPTIMUM, OPTIMUM_PYTHON, tmp_path)


def lines(bundle: Bundle, parent: str) -> str:
    """The manifest's lines, with the words that are the reader's to fill in."""
    variables = {"parent": parent, "name": bundle.folder.name, "text": TEXT}
    constants = [f"const {key} = {json.dumps(value)};" for key, value in variables.items()]
    return "\n".join([*constants, bundle.load[WEB]])


@needs_node
@pytest.mark.parametrize("name", [*MODELS, *BROWSER_MODELS])
def test_transformers_js_opens_its_layout(name: str, bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles(name)
    (with_node_modules(tmp_path) / "load.mjs").write_text(lines(bundle, f"{bundle.folder.parent}/"))
    check_text(output(["node", tmp_path / "load.mjs"], tmp_path), bundle)


@needs_node
@needs_playwright
@needs_chromium
@pytest.mark.parametrize("name", BROWSER_MODELS)
def test_the_same_folder_opens_in_a_browser(name: str, bundles: Bundles, tmp_path: Path) -> None:
    bundle, page = bundles(name), tmp_path / "page.mjs"
    page.write_text(f"{lines(bundle, '/models/')}\nexport default answer.generated_text;\n")
    printed = in_chromium(page, bundle.folder.parent)
    check_text(printed["result"], bundle)
    assert sum(path.endswith("_data") for path in printed["served"]) == 1
