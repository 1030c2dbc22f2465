"""From a recipe's budget to a bundle that holds it, through the stages, on tiny twins."""

from __future__ import annotations

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
from edgedisp.pipeline.bundles import quantize_searched
from edgedisp.pipeline.options import SearchOptions
from edgedisp.pipeline.size_estimate import check_budget
from edgedisp.pipeline.stage import Inputs
from edgedisp.quantize.calibration import gptq_model
from edgedisp.quantize.mixed_precision import USUAL, text_pieces
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.quantize.sensitivity import Reference, find_weights, loss, replaced
from edgedisp.recipe import Quantize

TOKENS = np.random.default_rng(0).integers(3, twins.VOCABULARY, (8, 40)).astype(np.uint16)
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Model, fp32 bundle and corpus of a llama twin."""
    root = tmp_path_factory.mktemp("twin")
    folders = {name: root / name for name in ("model", "bundle", "corpus")}
    twins.make(folders["model"], "llama", initializer_range=0.08)
    for name in ("bundle", "corpus"):
        folders[name].mkdir()
    export(folders["model"], folders["bundle"], threads=1)
    np.save(folders["corpus"] / "tokens.npy", TOKENS)
    return folders


def searched(folders: Folders, out: Path, **goal: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    section = Quantize.model_validate(goal)
    options = SearchOptions(section.int4, section.budget, section.max_perplexity_increase)
    return quantize_searched(options, Inputs(**folders), out, silent)


def kl_of_bundle(reference: Any, bundle: Path) -> float:
    """KL(reference || the bundle in fp32 arithmetic) on the text of the search, in nats per token."""
    exact = OnnxModel(bundle, 1, graph=at_accuracy_level(bundle, 0))
    meter = DivergenceMeter()
    for piece in text_pieces(TOKENS, twins.VOCABULARY):
        ids, mask = piece[None].numpy(), np.ones((1, len(piece)), np.int64)
        meter.add(reference(ids, mask)[0], exact(ids, mask)[0])
    return float(meter.result().mean_kl)


def size(bundle: Path) -> int:
    return sum((bundle / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


@pytest.fixture(scope="module")
def sizes(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Bytes of the twin's uniform bundles."""
    sizes = {}
    for bits, group in ((4, 128), (8, 32)):
        out = tmp_path_factory.mktemp("uniform")
        quantize_bundle(folders["bundle"], out, bits=bits, group=group, head_bits=bits)
        sizes[f"{bits}"] = size(out)
    return sizes


def test_a_budget_is_held_by_the_files_and_what_was_measured_is_what_ships(
    folders: Folders, sizes: dict[str, int], tmp_path: Path
) -> None:
    budget = round(sizes["4"] + 0.2 * (sizes["8"] - sizes["4"]))
    record = searched(folders, tmp_path, budget=f"{budget / 1000}kB", int4={"accuracy_level": 0})
    search = record["search"]
    assert record["size_bytes"] == search["size_bytes"] == size(tmp_path) <= budget
    assert {row["bits"] for row in record["by_tensor"]} == {4, 8}
    measured = kl_of_bundle(models.TorchModel(models.load(folders["model"])), tmp_path)
    assert search["measured_kl"] == pytest.approx(measured, rel=2e-2)
    assert search["predicted_kl"] == pytest.approx(measured, rel=0.5)
    names = [point["name"] for point in search["points"]]
    assert names == ["chosen", "uniform int4", "uniform int8", "smallest"]
    losses = [point["predicted_kl"] for point in search["curve"]]
    assert losses == sorted(losses, reverse=True)
    assert search["curve"][0]["size_bytes"] <= budget <= search["curve"][-1]["size_bytes"] + 40_000


def test_under_gptq_a_weight_costs_what_gptq_makes_of_it(
    folders: Folders, sizes: dict[str, int], tmp_path: Path
) -> None:
    int4 = {"method": "gptq", "calibration_tokens": 7 * TOKENS.shape[1]}
    record = searched(folders, tmp_path, budget=f"{sizes['8'] / 1000}kB", int4=int4)
    plain, quantized = models.load(folders["model"]), models.load(folders["model"])
    gptq_model(quantized, TOKENS[:7], USUAL.grid, correction=0.0)
    reference = Reference(plain, text_pieces(TOKENS, twins.VOCABULARY))
    layers = [weight for weight in find_weights(folders["bundle"], plain) if not weight.outer]
    for weight in layers:
        with torch.no_grad(), replaced(plain, [weight], lambda weight, _: weight.read(quantized)):
            alone = reference.kl(plain)
        assert record["search"]["sensitivity"][weight.name] == pytest.approx(alone, rel=1e-3), weight.name
    assert len(layers) > 4


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_limit_on_perplexity_holds_on_the_training_text(
    method: str, folders: Folders, tmp_path: Path
) -> None:
    int4 = {"method": method, "accuracy_level": 0, "calibration_tokens": 256}
    record = searched(folders, tmp_path, max_perplexity_increase="2%", int4=int4)
    blocks = [torch.from_numpy(block.astype(np.int64)) for block in TOKENS]
    before, bundle = loss(models.load(folders["model"]), blocks), OnnxModel(tmp_path, 1)
    after = []
    for block in blocks:
        logits = torch.from_numpy(bundle(block[None].numpy(), np.ones((1, 40), np.int64))[0])
        after.append(torch.nn.functional.cross_entropy(logits[:-1].double(), block[1:]).item())
    increase = np.exp(np.mean(after) - before) - 1
    assert increase <= 0.02
    search = record["search"]
    last = search["gptq"] if method == "gptq" else search
    assert last["perplexity_increase"] == pytest.approx(increase, abs=2e-3)
    assert len(search["trials"]) > 1
    inner = [row["method"] for row in record["by_tensor"] if row["component"] in ("attention", "mlp")]
    assert (set(inner) == {"gptq"}) == (method == "gptq")


def test_a_goal_out_of_reach_is_refused_with_what_is_possible(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"fits 0\.0 MB; the smallest, .* takes 0\.\d MB"):
        searched(folders, tmp_path, budget="10kB")
    with pytest.raises(BadInput, match=r"0\.00% cannot be reached; .* rises by"):
        searched(folders, tmp_path, max_perplexity_increase=1e-9)
    assert not list(tmp_path.iterdir())


def test_the_smallest_bundle_is_known_without_a_search(folders: Folders, tmp_path: Path) -> None:
    record = searched(folders, tmp_path, budget="1MB")
    (smallest,) = (point for point in record["search"]["points"] if point["name"] == "smallest")
    base = Inputs(base=folders["model"])
    estimate = check_budget(10**9, base, tmp_path, silent)["smallest_bytes"]
    assert estimate == pytest.approx(smallest["size_bytes"], rel=0.15)  # pages and names weigh in a twin
    with pytest.raises(BadInput, match=r"fits 0\.0 MB; the smallest, .* takes 0\.\d MB"):
        check_budget(estimate // 2, base, tmp_path, silent)


def finished(folders: Folders, root: Path, arm: str, **goal: Any) -> Record:
    """An arm's searched int4 bundle as a build leaves it, with its record."""
    folder = root / arm / "int4"
    folder.parent.mkdir(parents=True)
    with stage_output(folder, {"stage": arm}) as partial:
        return finish(partial, folder, {"stage": arm}, searched(folders, partial, **goal), 0.0)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_arm_that_follows_is_stored_as_the_one_that_searched(
    method: str, folders: Folders, sizes: dict[str, int], tmp_path: Path
) -> None:
    other = {**folders, "model": tmp_path / "model", "bundle": tmp_path / "fp32"}
    model = models.load(folders["model"])
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.01 * drawn)
    models.save(model, models.load_tokenizer(folders["model"]), other["model"])
    other["bundle"].mkdir()
    export(other["model"], other["bundle"], threads=1)
    middle = round((sizes["4"] + sizes["8"]) / 2)
    int4 = {"method": method, "calibration_tokens": 256, "accuracy_level": 4}
    goal = {"budget": f"{middle / 1000}kB", "int4": int4}
    first = finished(folders, tmp_path, "baseline", **goal)
    second = finished({**other, "decider": first.folder}, tmp_path, "dispersed", **goal)
    names = ("name", "bits", "group", "symmetric", "method")
    rows, nodes = [], []
    for record in (first, second):
        rows.append([{name: row[name] for name in names} for row in record.results["by_tensor"]])
        graph = onnx.load(record.folder / "model.onnx", load_external_data=False).graph
        nodes.append([node.SerializeToString() for node in graph.node])
    assert rows[0] == rows[1] and len({row["bits"] for row in rows[0]}) > 1
    assert nodes[0] == nodes[1]
    assert first.sha256("model.onnx.data") != second.sha256("model.onnx.data")
    search = second.results["search"]
    assert search["decided_by"] == "baseline" and search["size_bytes"] <= middle
    measured = kl_of_bundle(OnnxModel(other["bundle"], 1), second.folder)
    assert search["measured_kl"] == pytest.approx(measured, rel=2e-2)
