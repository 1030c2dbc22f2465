"""One folder for three runtimes: weights once, and graphs that give the same logits."""

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

from edgedisp.core.errors import BuildFailed
from edgedisp.graph import runtime_layouts as layouts
from edgedisp.graph.runtime_layouts import GENAI, LAYOUTS, OPTIMUM, WEB
from edgedisp.graph.verify import check_layouts

WEB_GRAPH, WEB_DATA = "onnx/model_q4.onnx", "onnx/model_q4.onnx_data"
PLAIN = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "weight_map.json"}
PLAIN |= {"config.json", "generation_config.json"}


@pytest.fixture(scope="module")
def bundle(twins: TwinStore) -> Path:
    return twins.quantized("llama", symmetric=False)


def arranged(bundle: Path, out: Path, *names: str) -> tuple[Path, dict[str, dict[str, str]]]:
    shutil.copytree(bundle, out)
    return out, layouts.arrange(out, names, "int4")


@pytest.mark.parametrize(("names", "expected"), [
    (LAYOUTS, {"genai_config.json", "model.onnx", WEB_GRAPH, WEB_DATA}),
    ((GENAI,), {"genai_config.json", "model.onnx", "model.onnx.data"}),
    ((OPTIMUM,), {"model.onnx", "model.onnx.data"}),
    ((WEB,), {WEB_GRAPH, WEB_DATA}),
])  # fmt: skip
def test_layouts_have_what_their_runtimes_read_and_the_weights_once(
    names: tuple[str, ...], expected: set[str], bundle: Path, tmp_path: Path
) -> None:
    folder, entries = arranged(bundle, tmp_path / "out", *names)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == PLAIN | expected and tuple(entries) == names
    data = WEB_DATA if WEB in names else "model.onnx.data"
    assert {entry["weights"] for entry in entries.values()} == {data}
    assert (folder / data).read_bytes() == (bundle / "model.onnx.data").read_bytes()
    assert (folder / data).stat().st_nlink == 1  # onnxruntime opens no hard-linked weights
    graphs = {name: entry["graph"] for name, entry in entries.items()}
    assert graphs == {name: WEB_GRAPH if name == WEB else "model.onnx" for name in names}
    check_layouts(folder, entries, bundle, ragged([17])[0], 1)  # bit for bit
    if WEB in names:
        config = json.loads((folder / "config.json").read_text())["transformers.js_config"]
        assert config == {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1}}
        assert 'dtype: "q4"' in entries[WEB]["load"]


def test_a_graph_that_computes_something_else_is_not_shipped(bundle: Path, tmp_path: Path) -> None:
    folder, entries = arranged(bundle, tmp_path / "all", *LAYOUTS)
    web = onnx.load(folder / WEB_GRAPH, load_external_data=False)
    norm = next(tensor for tensor in web.graph.initializer if tensor.name == "model.norm.weight")
    norm.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(norm) * np.float32(1.01), norm.name))
    (folder / WEB_GRAPH).write_bytes(web.SerializeToString())
    with pytest.raises(BuildFailed, match=r"onnx/model_q4\.onnx differs .* by 0\."):
        check_layouts(folder, entries, bundle, ragged([9])[0], 1)
    (folder / WEB_DATA).unlink()
    with pytest.raises(BuildFailed, match="onnxruntime cannot open"):
        check_layouts(folder, entries, bundle, ragged([9])[0], 1)


def test_tokenizer_settings_suit_every_runtime(bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(bundle, source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    for name, written, post, adds_bos in (
        ("TokenizersBackend", "PreTrainedTokenizerFast", "<|im_start|> $A", True),
        ("Qwen2Tokenizer", "Qwen2Tokenizer", "$A <|im_end|>", None),
    ):
        (source / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": name}))
        inner = Tokenizer.from_file(str(bundle / "tokenizer.json"))
        special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
        inner.post_processor = TemplateProcessing(post, special_tokens=special)
        inner.save(str(source / "tokenizer.json"))
        folder, _ = arranged(source, tmp_path / name, OPTIMUM)
        result = json.loads((folder / "tokenizer_config.json").read_text())
        assert result["tokenizer_class"] == written and result.get("add_bos_token") is adds_bos
