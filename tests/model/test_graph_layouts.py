"""One folder for three runtimes: weights once, and graphs that say the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_twins import TwinStore, ragged
from onnx import numpy_helper
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.graph import runtime_layouts as layouts
from edgedisp.graph.runtime_layouts import GENAI, LAYOUTS, OPTIMUM, WEB

TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "weight_map.json"}
CONFIG = {"config.json", "generation_config.json"}


@pytest.fixture(scope="module")
def bundle(twins: TwinStore) -> Path:
    return twins.quantized("llama", symmetric=False)


def arranged(bundle: Path, out: Path, *names: str) -> tuple[Path, dict[str, dict[str, str]]]:
    shutil.copytree(bundle, out)
    return out, layouts.arrange(out, names, "int4")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_all_layouts_together_store_the_weights_once(bundle: Path, tmp_path: Path) -> None:
    folder, entries = arranged(bundle, tmp_path / "all", *LAYOUTS)
    weights = "onnx/model_q4.onnx_data"
    assert files(folder) == TOKENIZER | CONFIG | {
        "genai_config.json", "model.onnx", "onnx/model_q4.onnx", weights,
    }  # fmt: skip
    assert {name: entry["graph"] for name, entry in entries.items()} == {
        GENAI: "model.onnx", WEB: "onnx/model_q4.onnx", OPTIMUM: "model.onnx",
    }  # fmt: skip
    assert {entry["weights"] for entry in entries.values()} == {weights}
    assert (folder / weights).read_bytes() == (bundle / "model.onnx.data").read_bytes()
    layouts.check_same(folder, layouts.graphs(entries), bundle, ragged([17])[0], 1)  # bit for bit
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers.js_config"] == {
        "dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1},
    }  # fmt: skip
    assert 'dtype: "q4"' in entries[WEB]["load"]
    for path in folder.rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or path.stat().st_nlink == 1, path  # onnx opens no hard-linked weights


@pytest.mark.parametrize(
    ("names", "graphs"),
    [
        ((GENAI,), {"genai_config.json", "model.onnx", "model.onnx.data"}),
        ((OPTIMUM,), {"model.onnx", "model.onnx.data"}),
        ((WEB,), {"onnx/model_q4.onnx", "onnx/model_q4.onnx_data"}),
    ],
)
def test_a_layout_alone_has_what_its_runtime_reads(
    names: tuple[str, ...], graphs: set[str], bundle: Path, tmp_path: Path
) -> None:
    folder, entries = arranged(bundle, tmp_path / "one", *names)
    assert files(folder) == TOKENIZER | CONFIG | graphs
    assert tuple(entries) == names
    layouts.check_same(folder, layouts.graphs(entries), bundle, ragged([9])[0], 1)


def test_a_graph_that_says_something_else_is_not_shipped(bundle: Path, tmp_path: Path) -> None:
    folder, entries = arranged(bundle, tmp_path / "all", *LAYOUTS)
    web = onnx.load(folder / "onnx/model_q4.onnx", load_external_data=False)
    norm = next(tensor for tensor in web.graph.initializer if tensor.name == "model.norm.weight")
    norm.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(norm) * np.float32(1.01), norm.name))
    (folder / "onnx/model_q4.onnx").write_bytes(web.SerializeToString())
    with pytest.raises(BuildFailed, match=r"onnx/model_q4\.onnx differs .* by 0\."):
        layouts.check_same(folder, layouts.graphs(entries), bundle, ragged([9])[0], 1)
    (folder / "onnx/model_q4.onnx_data").unlink()
    with pytest.raises(BuildFailed, match="onnxruntime cannot open"):
        layouts.check_same(folder, ["model.onnx"], bundle, ragged([9])[0], 1)


def test_a_tokenizer_class_of_transformers_5_is_named_as_transformers_4_knows_it(
    bundle: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(bundle, source)
    settings_ = json.loads((source / "tokenizer_config.json").read_text())
    for found, written in (("TokenizersBackend", "PreTrainedTokenizerFast"), ("Qwen2Tokenizer",) * 2):
        (source / "tokenizer_config.json").write_text(json.dumps({**settings_, "tokenizer_class": found}))
        folder, _ = arranged(source, tmp_path / found, OPTIMUM)
        assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == written


def test_a_token_that_begins_every_text_is_told_to_transformers_js(bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(bundle, source)
    for post, told in (("<|im_start|> $A", True), ("$A <|im_end|>", None), ("$A", None)):
        inner = Tokenizer.from_file(str(bundle / "tokenizer.json"))
        inner.post_processor = TemplateProcessing(
            post, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
        )
        inner.save(str(source / "tokenizer.json"))
        folder, _ = arranged(source, tmp_path / post.replace(" ", ""), WEB)
        assert json.loads((folder / "tokenizer_config.json").read_text()).get("add_bos_token") is told


def test_unknown_layouts_and_those_that_a_family_lacks_are_refused(bundle: Path, tmp_path: Path) -> None:
    for names in (("onnx",), ()):
        with pytest.raises(BadInput, match=r"choices: onnxruntime-genai, transformers.js, optimum"):
            layouts.arrange(bundle, names, "int4")
    shutil.copytree(bundle, tmp_path / "plain")
    (tmp_path / "plain" / "genai_config.json").unlink()
    with pytest.raises(BadInput, match=r"there are transformers.js, optimum"):
        layouts.arrange(tmp_path / "plain", LAYOUTS, "int4")
