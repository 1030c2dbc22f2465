"""A bundle made ready for a device computes within its context what it computed before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_twins import CONTEXT, FAMILIES, make, ragged
from tiny_bundle import tiny_bundles

from edgedisp.core.errors import BadInput
from edgedisp.graph import genai_config
from edgedisp.graph.device_graph import for_device, position_tables
from edgedisp.graph.export import export
from edgedisp.graph.session import OnnxModel
from edgedisp.quantize.rewrite import quantize_bundle

SHORT = 48


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> int4 bundle of its twin, for all of its 128 positions; `builder`: onnxruntime-genai's."""
    root = tmp_path_factory.mktemp("device")
    found = {"builder": tiny_bundles(root)["int4"]}
    for family in FAMILIES:
        make(root / family, family)
        for precision in ("fp32", "int4"):
            (root / f"{family}-{precision}").mkdir()
        export(root / family, root / f"{family}-fp32", threads=1)
        quantize_bundle(root / f"{family}-fp32", root / f"{family}-int4", bits=4)
        found[family] = root / f"{family}-int4"
    return found


def on_device(bundle: Path, out: Path, context: int) -> Path:
    out.mkdir()
    for_device(bundle, out, threads=3, context=context, last_logits=False)
    return out


@pytest.mark.parametrize("family", [*FAMILIES, "builder"])
def test_within_the_shorter_context_no_logit_changes(
    family: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    own, short = bundles[family], on_device(bundles[family], tmp_path / "short", SHORT)
    before, after = OnnxModel(own, 1), OnnxModel(short, 1)
    row = [token % before.vocab_size for token in ragged([SHORT])[0]]
    ids = np.array([row], np.int64)
    ones = np.ones_like(ids)
    np.testing.assert_array_equal(after(ids, ones), before(ids, ones))
    assert after.greedy(row[:4], SHORT, frozenset()) == before.greedy(row[:4], SHORT - 4, frozenset())


@pytest.mark.parametrize("family", [*FAMILIES, "builder"])
def test_tables_keep_one_row_for_each_position_and_nothing_else_goes(
    family: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    own, short = bundles[family], on_device(bundles[family], tmp_path / "short", SHORT)
    graphs = [onnx.load(one / "model.onnx", load_external_data=False).graph for one in (own, short)]
    names = position_tables(ir.load(own / "model.onnx").graph)
    assert len(names) == {"gpt2": 1, "opt": 1, "gemma3_text": 4}.get(family, 2)
    rows = [{t.name: t.dims[0] for t in graph.initializer if t.name in names} for graph in graphs]
    assert set(rows[1].values()) == {SHORT}
    assert set(rows[0].values()) == {genai_config.context_length(own)}
    stored = [
        sum(int(entry.value) for t in graph.initializer for entry in t.external_data if entry.key == "length")
        for graph in graphs
    ]
    columns = {t.name: t.dims[1] for t in graphs[0].initializer if t.name in names}
    outside = [t.name for t in graphs[0].initializer if t.name in names and t.external_data]
    gone = sum(4 * columns[name] * (rows[0][name] - SHORT) for name in outside)
    assert stored[0] - stored[1] == gone > 0


def test_configuration_says_threads_and_context(bundles: dict[str, Path], tmp_path: Path) -> None:
    short = on_device(bundles["gpt2"], tmp_path / "short", SHORT)
    config = json.loads((short / "genai_config.json").read_text())
    assert config["model"]["context_length"] == config["search"]["max_length"] == SHORT
    assert config["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 3
    assert json.loads((short / "config.json").read_text())["n_positions"] == SHORT


def test_a_longer_context_than_the_bundles_leaves_the_weights_as_they_are(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    own, same = bundles["llama"], on_device(bundles["llama"], tmp_path / "same", 10**6)
    assert genai_config.context_length(same) == CONTEXT
    assert (same / "model.onnx.data").read_bytes() == (own / "model.onnx.data").read_bytes()


def test_records_and_cards_of_the_source_stay_behind(bundles: dict[str, Path], tmp_path: Path) -> None:
    source = on_device(bundles["llama"], tmp_path / "source", SHORT)
    for name in ("record.json", "manifest.json", "README.md"):
        (source / name).write_text("{}")
    out = on_device(source, tmp_path / "out", SHORT)
    assert {path.name for path in source.iterdir()} - {path.name for path in out.iterdir()} == {
        "record.json", "manifest.json", "README.md",
    }  # fmt: skip


def test_what_cannot_be_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="context is 0"):
        for_device(bundles["llama"], tmp_path / "out", threads=1, context=0)
    with pytest.raises(BadInput, match="no bundle"):
        for_device(tmp_path, tmp_path / "out", threads=1, context=8)
    source = on_device(bundles["llama"], tmp_path / "source", CONTEXT)
    model = onnx.load(source / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere.data"
    (source / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadInput, match="points outside the bundle"):
        for_device(source, tmp_path / "out", threads=1, context=8)


def test_a_device_gets_the_last_tokens_logits_alone_and_its_own_context_by_default(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    own = bundles["llama"]
    (tmp_path / "device").mkdir()
    record = for_device(own, tmp_path / "device", threads=1)
    assert record["context"] == genai_config.context_length(own)
    ids = np.array([ragged([20])[0]], np.int64)
    whole, last = (OnnxModel(one, 1)(ids, np.ones_like(ids)) for one in (own, tmp_path / "device"))
    assert last.shape[1] == 1
    np.testing.assert_allclose(last[0, 0], whole[0, -1], rtol=1e-5, atol=1e-5)
