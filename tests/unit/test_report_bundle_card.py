"""The card of a bundle says what the manifest and the build know, and nothing that nobody measured."""

from __future__ import annotations

import copy
from typing import Any

from report_sample import sample

from edgedisp.report import bundle_card, verdict

MANIFEST: dict[str, Any] = {
    "target": "phone-arm64",
    "precision": "int4",
    "grid": {
        "bits": 4, "group": 32, "symmetric": False, "head_bits": 8, "method": "gptq", "accuracy_level": 4,
    },
    "threads": 4,
    "context": 2048,
    "size_bytes": 104_000_000,
    "layouts": {
        "onnxruntime-genai": {"graph": "model.onnx", "weights": "data", "load": "og.Model(folder)"},
        "transformers.js": {"graph": "onnx/model_q4.onnx", "weights": "w", "load": "await pipeline()"},
    },
    "base": {
        "base": "org/name", "license": "apache-2.0", "license_name": None, "license_link": None,
        "found_in": "README.md", "files": ["LICENSE"],
    },
    "provenance": {
        "recipe": {"name": "quick", "hash8": "01234567"}, "data_sha256": "d" * 64, "seed": 3,
        "arm": "dispersed", "weights_sha256": "e" * 64, "edgedisp": "0.1.0", "git_commit": "abc",
        "versions": {"onnxruntime": "1.31.1"},
    },
}  # fmt: skip


def changed(**parts: Any) -> dict[str, Any]:
    return {**copy.deepcopy(MANIFEST), **parts}


def test_the_card_of_a_build_has_the_table_at_the_shipped_precision_and_the_verdict() -> None:
    card = bundle_card(MANIFEST, "dispersed/phone-arm64", sample())
    rows = [line.split("|")[1].strip() for line in card.splitlines() if line.startswith("| ")]
    assert "int4" in rows and "int8" not in rows and "torch fp32" not in rows
    assert verdict(sample())["sentence"] in card.replace("\\", "")
    table = next(line for line in card.splitlines() if line.startswith("| int4"))
    assert "[" in table or "±" in table  # with intervals
    assert "Nothing was measured" not in card


def test_the_card_of_an_export_alone_has_no_table_and_says_so() -> None:
    card = bundle_card(MANIFEST, "box")
    assert "# box, for phone-arm64" in card
    assert "Nothing was measured: this bundle was exported on its own." in card
    assert "| int4" not in card and "## Training" not in card
    assert "the dispersed arm of a build on top of org/name" in card


def test_every_layout_is_shown_with_its_lines_in_its_language() -> None:
    card = bundle_card(MANIFEST, "box")
    assert "### onnxruntime-genai" in card and "```python\nog.Model(folder)\n```" in card
    assert "### transformers.js" in card and "```js\nawait pipeline()\n```" in card


def test_the_grid_and_where_it_comes_from_are_told() -> None:
    card = bundle_card(MANIFEST, "box")
    assert "Weights at 4 bits (asymmetric, groups of 32, method gptq), embedding and head at 8" in card
    for part in ("quick (01234567)", "d" * 64, "e" * 64, "abc", "1.31.1", "2048 tokens; 4 threads", "104 MB"):
        assert part in card
    assert "Weights in fp32" in bundle_card(changed(precision="fp32", grid=None), "box")


def test_the_licence_of_the_base_is_told_or_said_to_be_unknown() -> None:
    card = bundle_card(MANIFEST, "box")
    assert "The base model's licence: apache-2.0, as it says in README.md." in card.replace("\\", "")
    assert "Its licence texts are in this folder: `LICENSE`." in card
    unknown = bundle_card(changed(base={"base": None, "license": None, "files": []}), "box")
    assert "Licence of the base not found: look it up before you distribute." in unknown
    assert "license:" not in card.split("---")[1]


def test_a_name_from_outside_cannot_break_out_of_its_line() -> None:
    card = bundle_card(changed(base={"base": "a/b\n\n# A heading <script>", "files": []}), "x")
    assert "\n# A heading" not in card and "<script>" not in card
