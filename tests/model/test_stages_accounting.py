"""What the accounting tells before anything runs, against the files of real exports."""

from __future__ import annotations

import json
from pathlib import Path

import graph_twins
import onnx
import pytest

from edgedisp import models
from edgedisp.graph.export import export
from edgedisp.graph.outline import cache_bytes, outline
from edgedisp.graph.session import OnnxModel
from edgedisp.plan_text import render
from edgedisp.quantize.account import account
from edgedisp.quantize.grid import Grid
from edgedisp.quantize.rewrite import quantize_bundle
from edgedisp.recipe import QuantizeBits
from edgedisp.stages import size_account

# bits, group, symmetric, head bits
GRIDS = [(8, 32, True, 8), (4, 32, False, 8), (4, 16, True, 4), (4, 64, False, 4), (2, 128, False, 8)]


def options(group: int, symmetric: bool, head_bits: int) -> QuantizeBits:
    return QuantizeBits(group=group, symmetric=symmetric, head_bits=head_bits)


def sizes_of(bundle: Path) -> tuple[int, int]:
    return tuple((bundle / name).stat().st_size for name in ("model.onnx.data", "model.onnx"))  # type: ignore[return-value]


@pytest.mark.parametrize("form", graph_twins.FORMS)
def test_the_accounting_is_the_files_byte_for_byte(form: str, tmp_path: Path) -> None:
    folder, fp32 = tmp_path / "model", tmp_path / "fp32"
    graph_twins.make(folder, form)
    fp32.mkdir()
    export(folder, fp32, threads=1)
    quantized = {
        f"{bits}-{group}-{symmetric}-{head}": (bits, options(group, symmetric, head))
        for bits, group, symmetric, head in GRIDS
    }
    found = size_account(models.empty_model(folder), quantized, {})
    assert found["exact"] and list(found["precisions"]) == ["fp32", *quantized]
    assert found["tied"] == models.empty_model(folder).config.tie_word_embeddings
    told = {name: (one["data_bytes"], one["graph_bytes"]) for name, one in found["precisions"].items()}
    assert told["fp32"] == sizes_of(fp32)
    for (bits, group, symmetric, head), name in zip(GRIDS, quantized):
        bundle = tmp_path / name
        bundle.mkdir()
        record = quantize_bundle(fp32, bundle, bits=bits, group=group, symmetric=symmetric, head_bits=head)
        assert told[name] == sizes_of(bundle)
        components = found["precisions"][name]["components"]
        for part, row in record["by_component"].items():
            if part != "other":  # the record leaves integers out
                assert components[part] == row["size_bytes"]
        assert found["precisions"][name]["size_bytes"] == record["size_bytes"]


def test_a_grid_for_one_tensor_goes_before_the_others(tmp_path: Path) -> None:
    shapes = outline(_skeleton(tmp_path, "llama"))
    body = Grid(4, 32, False)
    name = "model.layers.1.mlp.down_proj.weight"
    plain = account(shapes.model, body, Grid(8, 32, False))
    mixed = account(shapes.model, body, Grid(8, 32, False), {name: Grid(8, 16, True)})
    [tensor] = [one for one in shapes.model.graph.initializer if one.name == name]
    columns, rows = tensor.dims  # stored as MatMul reads it
    difference = Grid(8, 16, True).size_bytes(rows, columns) - body.size_bytes(rows, columns)
    assert mixed["components"]["mlp"] - plain["components"]["mlp"] == difference > 0
    assert mixed["components"] | {"mlp": 0} == plain["components"] | {"mlp": 0}


@pytest.mark.parametrize("form", graph_twins.FAMILIES)
def test_the_cache_is_what_the_session_returns(form: str, tmp_path: Path) -> None:
    folder, bundle = tmp_path / "model", tmp_path / "fp32"
    graph_twins.make(folder, form)
    bundle.mkdir()
    export(folder, bundle, threads=1)
    shipped = OnnxModel(bundle, 1)
    names = [one.name for one in shipped.session.get_outputs() if one.name.startswith("present")]
    feed = {one.name: _empty_cache(one.shape) for one in shipped.session.get_inputs() if "past" in one.name}
    ids = graph_twins.np.arange(3, 14)[None]
    present = shipped.session.run(
        names, {"input_ids": ids, "attention_mask": graph_twins.np.ones_like(ids), **feed}
    )
    shapes = outline(models.empty_model(folder))
    assert cache_bytes(shapes.model, 11) == sum(one.nbytes for one in present)


def _empty_cache(shape: list[int]) -> graph_twins.np.ndarray:
    return graph_twins.np.zeros((1, shape[1], 0, shape[3]), graph_twins.np.float32)


def test_the_cache_is_no_longer_than_the_bundle_holds(tmp_path: Path) -> None:
    found = size_account(_skeleton(tmp_path, "llama"), {}, {"far": 10_000, "near": 64})
    assert found["kv_cache"]["far"]["positions"] == found["context"] == graph_twins.CONTEXT
    assert found["kv_cache"]["near"]["size_bytes"] == 2 * 2 * 2 * 16 * 64 * 4  # layers, k and v, heads, width


def test_a_family_of_the_builder_is_told_within_2_percent(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "num_hidden_layers": 3}
    folder, fp32 = tmp_path / "model", tmp_path / "fp32"
    graph_twins.make(folder, "smollm3", **shape)
    fp32.mkdir()
    export(folder, fp32, threads=1)
    found = size_account(models.empty_model(folder), {"int4": (4, options(32, False, 8))}, {})
    assert not found["exact"] and found["tied"]
    assert found["precisions"]["fp32"]["size_bytes"] == pytest.approx(sum(sizes_of(fp32)), rel=0.02)
    bundle = tmp_path / "int4"
    bundle.mkdir()
    quantize_bundle(fp32, bundle, bits=4, symmetric=False)
    assert found["precisions"]["int4"]["data_bytes"] == pytest.approx(sizes_of(bundle)[0], rel=0.02)


def test_a_skeleton_needs_the_configuration_alone(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    graph_twins.make(folder, "gemma3_text")
    whole = account(outline(models.load(folder)).model)
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    bare = models.empty_model(folder)
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert account(outline(bare).model) == whole


def test_the_plan_shows_the_table() -> None:
    component = {"embedding": 113_246_208, "attention": 106_168_320, "positions": 2_097_152}
    fp32 = {"components": component, "data_bytes": 0, "graph_bytes": 0, "size_bytes": 222_000_000}
    sizes = {
        "exact": True,
        "tied": True,
        "context": 8192,
        "precisions": {"fp32": fp32},
        "kv_cache": {"laptop-x64": {"positions": 4096, "size_bytes": 188_743_680}},
    }
    planned = {"recipe": "r", "run": "x", "steps": 1, "tokens": 1, "threads": 1, "stages": []}
    seen = {"items": 500, "seeds": 1, "differing": 0.06, "points": 3.07}
    seen |= {"published_points": 0.7, "items_for_published": 9611, "nats": {"int4": 0.0065}}
    planned |= {"warning": None, "estimate": None, "sizes": sizes, "sizes_unknown": None, "detectable": seen}
    text = render(planned)
    assert "with 500 items a task shows differences of 3.1 points or more" in text
    assert "loss shows 0.0065 at int4" in text
    assert "0.7 points, takes 9,611 items" in text and "seeds: 3 can" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["embedding", "=", "head", "113.2"] in lines
    assert ["file", "222.0"] in lines and not any(line[:1] == ["mlp"] for line in lines)
    assert "KV cache of 4,096 positions (laptop-x64): 188.7 MB" in text
    json.dumps(sizes)


def _skeleton(tmp_path: Path, form: str) -> object:
    graph_twins.make(tmp_path / "model", form)
    return models.empty_model(tmp_path / "model")


def test_the_outline_is_a_graph_that_onnx_can_infer_shapes_of(tmp_path: Path) -> None:
    shapes = outline(_skeleton(tmp_path, "llama"))  # type: ignore[arg-type]
    assert onnx.shape_inference.infer_shapes(shapes.model).graph.node
