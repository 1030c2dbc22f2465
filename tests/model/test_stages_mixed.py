"""From a recipe's budget to a bundle that holds it, through the stages, on tiny twins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import onnx
import pytest
import torch

from edgedisp import models
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import silent
from edgedisp.core.stage_folder import Record, finish, stage_output
from edgedisp.evaluate.divergence import DivergenceMeter
from edgedisp.graph.export import export
from edgedisp.graph.session import OnnxModel, at_accuracy_level
from edgedisp.pipeline.build_plan import stages
from edgedisp.pipeline.bundles import quantize_searched
from edgedisp.pipeline.options import SearchOptions
from edgedisp.pipeline.size_estimate import check_budget
from edgedisp.pipeline.stage import Inputs, plain
from edgedisp.quantize.calibration import gptq_model
from edgedisp.quantize.mixed_precision import USUAL, text_pieces
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.quantize.sensitivity import Reference, find_weights, loss, replaced
from edgedisp.recipe import Quantize, load

TOKENS = np.random.default_rng(0).integers(3, twins.VOCABULARY, (8, 40)).astype(np.uint16)
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folders]:
    """form -> model, fp32 bundle and corpus, each made once."""
    made: dict[str, Folders] = {}

    def get(form: str) -> Folders:
        if form not in made:
            root = tmp_path_factory.mktemp("twin")
            found = {name: root / name for name in ("model", "fp32", "corpus")}
            twins.make(found["model"], form, initializer_range=0.08)
            for name in ("fp32", "corpus"):
                found[name].mkdir()
            export(found["model"], found["fp32"], threads=1)
            np.save(found["corpus"] / "tokens.npy", TOKENS)
            made[form] = found
        return made[form]

    return get


def searched(found: Folders, out: Path, **goal: Any) -> dict[str, Any]:
    out.mkdir()
    return search(found, out, goal)


def search(found: Folders, out: Path, goal: dict[str, Any], **decider: Path) -> dict[str, Any]:
    section = Quantize.model_validate(goal)
    options = SearchOptions(section.int4, section.budget, section.max_perplexity_increase)
    folders = {"bundle": found["fp32"], "model": found["model"], "corpus": found["corpus"], **decider}
    return quantize_searched(options, Inputs(**folders), out, silent)


def kl_of_shipped(reference: Any, bundle: Path) -> float:
    """KL(reference || the bundle in fp32 arithmetic) on the text of the search, in nats per token."""
    shipped = OnnxModel(bundle, 1, graph=at_accuracy_level(bundle, 0))
    meter = DivergenceMeter()
    for piece in text_pieces(TOKENS, twins.VOCABULARY):
        ids, mask = piece[None].numpy(), np.ones((1, len(piece)), np.int64)
        meter.add(reference(ids, mask)[0], shipped(ids, mask)[0])
    return float(meter.result().mean_kl)


def size(bundle: Path) -> int:
    return sum((bundle / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


@pytest.fixture(scope="module")
def sizes(folders: Callable[[str], Folders], tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Bytes of the llama twin's uniform bundles."""
    found = {}
    for bits, group in ((4, 128), (8, 32)):
        out = tmp_path_factory.mktemp("uniform")
        quantize_bundle(folders("llama")["fp32"], out, bits=bits, group=group, head_bits=bits)
        found[f"{bits}"] = size(out)
    return found


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_a_budget_is_held_by_the_files_and_what_was_measured_is_what_ships(
    share: float, folders: Callable[[str], Folders], sizes: dict[str, int], tmp_path: Path
) -> None:
    found = folders("llama")
    budget = round(sizes["4"] + share * (sizes["8"] - sizes["4"]))
    record = searched(found, tmp_path / "int4", budget=f"{budget / 1000}kB", int4={"accuracy_level": 0})
    search = record["search"]
    assert record["size_bytes"] == size(tmp_path / "int4") <= budget
    assert search["size_bytes"] == record["size_bytes"]
    rows = record["by_tensor"]
    assert {row["bits"] for row in rows} == {4, 8}
    measured = kl_of_shipped(models.TorchModel(models.load(found["model"])), tmp_path / "int4")
    assert search["measured_kl"] == pytest.approx(measured, rel=2e-2)
    assert search["predicted_kl"] == pytest.approx(measured, rel=0.5)
    names = [point["name"] for point in search["points"]]
    assert names == ["chosen", "uniform int4", "uniform int8", "smallest"]
    losses = [point["predicted_kl"] for point in search["curve"]]
    assert losses == sorted(losses, reverse=True)
    assert search["curve"][0]["size_bytes"] <= budget <= search["curve"][-1]["size_bytes"] + 40_000


def test_under_gptq_a_weight_costs_what_gptq_makes_of_it(
    folders: Callable[[str], Folders], sizes: dict[str, int], tmp_path: Path
) -> None:
    found, length = folders("llama"), TOKENS.shape[1]
    int4 = {"method": "gptq", "calibration_tokens": 7 * length}
    record = searched(found, tmp_path / "int4", budget=f"{sizes['8'] / 1000}kB", int4=int4)
    plain, quantized = models.load(found["model"]), models.load(found["model"])
    gptq_model(quantized, TOKENS[:7], USUAL.grid, correction=0.0)
    reference = Reference(plain, text_pieces(TOKENS, twins.VOCABULARY))
    layers = [weight for weight in find_weights(found["fp32"], plain) if not weight.outer]
    for weight in layers:
        with torch.no_grad(), replaced(plain, [weight], lambda weight, _: weight.read(quantized)):
            alone = reference.kl(plain)
        assert record["search"]["sensitivity"][weight.name] == pytest.approx(alone, rel=1e-3), weight.name
    assert len(layers) > 4


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_limit_on_perplexity_holds_on_the_training_text(
    method: str, folders: Callable[[str], Folders], tmp_path: Path
) -> None:
    found = folders("llama")
    int4 = {"method": method, "accuracy_level": 0, "calibration_tokens": 256}
    record = searched(found, tmp_path / "int4", max_perplexity_increase="2%", int4=int4)
    blocks = [torch.from_numpy(block.astype(np.int64)) for block in TOKENS]
    before, shipped = loss(models.load(found["model"]), blocks), OnnxModel(tmp_path / "int4", 1)
    after = []
    for block in blocks:
        logits = torch.from_numpy(shipped(block[None].numpy(), np.ones((1, 40), np.int64))[0])
        after.append(torch.nn.functional.cross_entropy(logits[:-1].double(), block[1:]).item())
    increase = np.exp(np.mean(after) - before) - 1
    assert increase <= 0.02
    search = record["search"]
    last = search["gptq"] if method == "gptq" else search
    assert last["perplexity_increase"] == pytest.approx(increase, abs=2e-3)
    assert len(search["trials"]) > 1
    inner = [row["method"] for row in record["by_tensor"] if row["component"] in ("attention", "mlp")]
    assert (set(inner) == {"gptq"}) == (method == "gptq")


def test_a_goal_out_of_reach_is_refused_with_what_is_possible(
    folders: Callable[[str], Folders], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"fits 0\.0 MB; the smallest, .* takes 0\.\d MB"):
        searched(folders("llama"), tmp_path / "a", budget="10kB")
    with pytest.raises(BadInput, match=r"0\.00% cannot be reached; .* rises by"):
        searched(folders("llama"), tmp_path / "b", max_perplexity_increase=1e-9)
    assert not list((tmp_path / "a").iterdir())


def test_the_smallest_bundle_is_known_without_a_search(
    folders: Callable[[str], Folders], tmp_path: Path
) -> None:
    record = searched(folders("llama"), tmp_path / "int4", budget="1MB")
    (smallest,) = (point for point in record["search"]["points"] if point["name"] == "smallest")
    base = Inputs(base=folders("llama")["model"])
    told = check_budget(10**9, base, tmp_path, silent)["smallest_bytes"]
    assert told == pytest.approx(smallest["size_bytes"], rel=0.15)  # pages and names weigh in a twin
    with pytest.raises(BadInput, match=r"fits 0\.0 MB; the smallest, .* takes 0\.\d MB"):
        check_budget(told // 2, base, tmp_path, silent)


def finished(found: Folders, root: Path, arm: str, decided: Path | None = None, **goal: Any) -> Record:
    """An arm's searched int4 bundle as a build leaves it, with its record."""
    folder = root / arm / "int4"
    folder.parent.mkdir(parents=True)
    with stage_output(folder, {"stage": arm}) as own:
        results = search(found, own, goal, **({} if decided is None else {"decider": decided}))
        return finish(own, folder, {"stage": arm}, results, 0.0)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_arm_that_follows_is_stored_as_the_one_that_searched(
    method: str, folders: Callable[[str], Folders], sizes: dict[str, int], tmp_path: Path
) -> None:
    first = folders("llama")
    other = {**first, "model": tmp_path / "model", "fp32": tmp_path / "fp32"}
    changed = models.load(first["model"])
    with torch.no_grad():
        for number, parameter in enumerate(changed.parameters()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.01 * drawn)
    models.save(changed, models.load_tokenizer(first["model"]), other["model"])
    other["fp32"].mkdir()
    export(other["model"], other["fp32"], threads=1)
    int4 = {"method": method, "calibration_tokens": 256, "accuracy_level": 4}
    middle = round((sizes["4"] + sizes["8"]) / 2)
    goal = {"budget": f"{middle / 1000}kB", "int4": int4}
    decider = finished(first, tmp_path, "baseline", **goal)
    follower = finished(other, tmp_path, "dispersed", decider.folder, **goal)
    kept = ("name", "bits", "group", "symmetric", "method")
    rows = [
        [{key: row[key] for key in kept} for row in one.results["by_tensor"]] for one in (decider, follower)
    ]
    assert rows[0] == rows[1] and len({row["bits"] for row in rows[0]}) > 1
    graphs = [
        onnx.load(one.folder / "model.onnx", load_external_data=False).graph for one in (decider, follower)
    ]
    assert [node.SerializeToString() for node in graphs[0].node] == [
        node.SerializeToString() for node in graphs[1].node
    ]
    assert decider.sha256("model.onnx.data") != follower.sha256("model.onnx.data")
    search = follower.results["search"]
    assert search["decided_by"] == "baseline" and search["size_bytes"] <= middle
    measured = kl_of_shipped(OnnxModel(other["fp32"], 1), follower.folder)
    assert search["measured_kl"] == pytest.approx(measured, rel=2e-2)


RECIPE = """\
name: tiny
model: {base: base}
data: {train: [{source: text.jsonl}], context: 64}
train: {tokens: 2k, lr: 1e-3}
"""


def keys(folder: Path, *overrides: str) -> dict[str, Any]:
    """Stage name -> its options and inputs."""
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    (folder / "text.jsonl").touch()
    return {one.name: (plain(one.options), dict(one.inputs)) for one in stages(load(path, overrides), 1)}


def test_a_budget_makes_the_int4_bundle_again_and_nothing_else(tmp_path: Path) -> None:
    uniform = keys(tmp_path)
    assert uniform["baseline/int4"][1] == {"bundle": "baseline/fp32"}
    budget = keys(tmp_path, "quantize.budget=100MB")
    assert {name for name in uniform if budget[name] != uniform[name]} == {"baseline/int4", "dispersed/int4"}
    assert set(budget["baseline/int4"][1].values()) == {"baseline/fp32", "baseline/model", "corpus"}
    assert keys(tmp_path, "quantize.budget=100MB", "quantize.int4.group=64") == budget
    gptq = keys(tmp_path, "quantize.budget=100MB", "quantize.int4.method=gptq")
    assert gptq["baseline/int4"] != budget["baseline/int4"]
    assert budget["dispersed/int4"][1]["decider"] == "baseline/int4"
    turned = [stage.name for stage in stages(load(tmp_path / "tiny.yaml", ["arms=[dispersed, baseline]"]), 1)]
    assert turned.index("baseline/int4") < turned.index("dispersed/int4")
