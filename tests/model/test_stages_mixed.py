"""From a recipe's budget to a bundle that holds it, through the stages, on tiny twins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import onnx
import pytest
import torch
from shared_store import SharedStore

from edgedisp import models
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import silent
from edgedisp.core.stage_folder import Record, finish, stage_output
from edgedisp.evaluate.loglikelihood import compare_logits
from edgedisp.graph.export import export
from edgedisp.graph.session import OnnxModel, at_accuracy_level
from edgedisp.pipeline.bundles import quantize_searched
from edgedisp.pipeline.options import SearchOptions
from edgedisp.pipeline.size_estimate import check_budget
from edgedisp.pipeline.stage import Inputs
from edgedisp.quantize.mixed_precision import find_weights, fisher
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.recipe.schema import Quantize

TOKENS = np.random.default_rng(0).integers(3, twins.VOCABULARY, (8, 40)).astype(np.uint16)
IDS = TOKENS.astype(np.int64)
BLOCKS = list(torch.from_numpy(IDS))
Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Model, fp32 bundle and corpus of a llama twin, and its uniform bundles `4` and `8`."""
    root = tmp_path_factory.mktemp("twin")
    folders = {name: root / name for name in ("model", "bundle", "corpus", "4", "8")}
    twins.make(folders["model"], "llama", initializer_range=0.08)
    for name in ("bundle", "corpus", "4", "8"):
        folders[name].mkdir()
    export(folders["model"], folders["bundle"], threads=1)
    for bits, group in ((4, 128), (8, 32)):
        quantize_bundle(folders["bundle"], folders[str(bits)], bits=bits, group=group, head_bits=bits)
    np.save(folders["corpus"] / "tokens.npy", TOKENS)
    return folders


def budget_of(folders: Folders, share: float) -> int:
    """Bytes between those of the uniform bundles."""
    small, large = size(folders["4"]), size(folders["8"])
    return round(small + share * (large - small))


def searched(folders: Folders, out: Path, **goal: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    section = Quantize.model_validate(goal)
    options = SearchOptions(section.int4, section.budget, section.max_perplexity_increase)
    inputs = {name: path for name, path in folders.items() if name not in ("4", "8")}
    return quantize_searched(options, Inputs(**inputs), out, silent)


def kl_of_bundle(reference: Any, bundle: Path) -> float:
    """KL(reference || the bundle in fp32 arithmetic) on the text of the search, in nats per token."""
    exact: Any = OnnxModel(bundle, 1, graph=at_accuracy_level(bundle, 0))
    return compare_logits({"reference": reference}, exact, IDS, silent)["reference"].mean_kl


def size(bundle: Path) -> int:
    return sum((bundle / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


def test_the_files_keep_the_budget_and_have_the_measured_divergence(folders: Folders, tmp_path: Path) -> None:
    budget = budget_of(folders, 0.2)
    record = searched(folders, tmp_path, budget=f"{budget / 1000}kB", int4={"accuracy_level": 0})
    search = record["search"]
    assert record["size_bytes"] == search["size_bytes"] == size(tmp_path) <= budget
    assert {row["bits"] for row in record["by_tensor"]} == {4, 8}
    measured = kl_of_bundle(models.TorchModel(models.load(folders["model"])), tmp_path)
    assert search["measured_kl"] == pytest.approx(measured, rel=2e-2)
    assert search["predicted_kl"] == pytest.approx(measured, rel=0.5)
    assert [point["name"] for point in search["points"]] == ["chosen", "uniform int4", "uniform int8"]
    losses = [point["predicted_kl"] for point in search["curve"]]
    assert losses == sorted(losses, reverse=True)
    assert search["curve"][0]["size_bytes"] <= budget <= search["curve"][-1]["size_bytes"] + 40_000


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_parts_of_one_parameter_get_one_choice(
    method: str, folders: Folders, store: SharedStore, tmp_path: Path
) -> None:
    """Phi-3's gate and up, which the builder's graph has as two weights."""
    stored = twins.TwinStore(store)
    phi3 = {**folders, "model": stored.model_dir("phi3"), "bundle": stored.fp32("phi3")}
    int4 = {"method": method, "accuracy_level": 0, "calibration_tokens": 256}
    record = searched(phi3, tmp_path, budget="358kB", int4=int4)
    search = record["search"]
    rows = {row["name"]: row for row in record["by_tensor"]}
    for layer in ("model.layers.0", "model.layers.1"):
        names = [f"{layer}.mlp.{name}_proj.MatMul.weight" for name in ("gate", "up")]
        gate, up = ({**rows[name], "name": None} for name in names)
        assert gate == up
        assert search["sensitivity"][names[0]] == search["sensitivity"][names[1]]
    assert {row["bits"] for row in rows.values()} == {4, 8}
    size = search["points"][0]["size_bytes"]
    assert record["size_bytes"] == pytest.approx(size, rel=0.03)
    measured = kl_of_bundle(models.TorchModel(models.load(phi3["model"])), tmp_path)
    assert search["measured_kl"] == pytest.approx(measured, rel=2e-2)


@pytest.mark.parametrize("form", ["llama", "gemma3_text", "gpt2", twins.UNTIED])
def test_the_predicted_cost_of_small_errors_is_their_divergence(form: str, store: SharedStore) -> None:
    stored, scale = twins.TwinStore(store), 3e-3
    model, noisy, weights = stored.model(form), stored.model(form), find_weights(stored.fp32(form))
    costs = fisher(model, weights, BLOCKS)
    predicted = 0.5 * scale**2 * sum(float(cost.sum()) for cost in costs.values())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights:
            for module in weight.modules(noisy):
                module.weight += scale * torch.randn(module.weight.shape, generator=generator)
    before, after = models.TorchModel(model), models.TorchModel(noisy)
    divergence = compare_logits({"before": before}, after, IDS, silent)["before"]
    assert divergence.mean_kl == pytest.approx(predicted, rel=0.25)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_limit_on_perplexity_holds_on_training_text(method: str, folders: Folders, tmp_path: Path) -> None:
    int4 = {"method": method, "accuracy_level": 0, "calibration_tokens": 256}
    record = searched(folders, tmp_path, max_perplexity_increase="2%", int4=int4)
    targets = torch.from_numpy(IDS)[:, 1:].flatten()
    losses = []
    for model in (models.TorchModel(models.load(folders["model"])), OnnxModel(tmp_path, 1)):
        logits = torch.as_tensor(model(IDS, np.ones_like(IDS)))
        losses.append(
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), targets).item()
        )
    increase = np.exp(losses[1] - losses[0]) - 1
    assert increase <= 0.02
    assert record["search"]["perplexity_increase"] == pytest.approx(increase, abs=2e-3)
    assert record["size_bytes"] < size(folders["8"])
    inner = [row["method"] for row in record["by_tensor"] if row["component"] in ("attention", "mlp")]
    assert (set(inner) == {"gptq"}) == (method == "gptq")


def test_an_impossible_goal_is_refused_and_the_smallest_size_known(folders: Folders, tmp_path: Path) -> None:
    too_small = r"fits 0\.0 MB; the smallest takes 0\.\d MB"
    with pytest.raises(BadInput, match=too_small):
        searched(folders, tmp_path, budget="10kB")
    with pytest.raises(BadInput, match=r"0\.00% cannot be reached; the least there is"):
        searched(folders, tmp_path, max_perplexity_increase=1e-9)
    assert not list(tmp_path.iterdir())
    record = searched(folders, tmp_path, budget="1MB")
    smallest = record["search"]["curve"][0]
    base = Inputs(base=folders["model"])
    estimate = check_budget(10**9, base, tmp_path, silent)["smallest_bytes"]
    assert estimate == pytest.approx(smallest["size_bytes"], rel=0.15)  # pages and names weigh in a twin
    with pytest.raises(BadInput, match=too_small):
        check_budget(estimate // 2, base, tmp_path, silent)


def finished(folders: Folders, root: Path, arm: str, **goal: Any) -> Record:
    """An arm's searched int4 bundle as a build leaves it, with its record."""
    folder = root / arm / "int4"
    folder.parent.mkdir(parents=True)
    with stage_output(folder, {"stage": arm}) as partial:
        return finish(partial, folder, {"stage": arm}, searched(folders, partial, **goal), 0.0)


def test_an_arm_that_follows_is_stored_alike(folders: Folders, tmp_path: Path) -> None:
    other = {**folders, "model": tmp_path / "model", "bundle": tmp_path / "fp32"}
    model = models.load(folders["model"])
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.01 * noise)
    models.save(model, models.load_tokenizer(folders["model"]), other["model"])
    other["bundle"].mkdir()
    export(other["model"], other["bundle"], threads=1)
    middle = budget_of(folders, 0.5)
    int4 = {"method": "gptq", "calibration_tokens": 256, "accuracy_level": 4}
    goal = {"budget": f"{middle / 1000}kB", "int4": int4}
    first = finished(folders, tmp_path, "baseline", **goal)
    second = finished({**other, "decider": first.folder}, tmp_path, "dispersed", **goal)
    graphs = [onnx.load(r.folder / "model.onnx", load_external_data=False).graph for r in (first, second)]
    assert [*graphs[0].node] == [*graphs[1].node]
    rows = [record.results["by_tensor"] for record in (first, second)]
    assert rows[0] == rows[1] and len({row["bits"] for row in rows[0]}) > 1
    assert first.sha256("model.onnx.data") != second.sha256("model.onnx.data")
    search = second.results["search"]
    assert search["decided_by"] == "baseline" and search["size_bytes"] <= middle
    measured = kl_of_bundle(OnnxModel(other["bundle"], 1), second.folder)
    assert search["measured_kl"] == pytest.approx(measured, rel=2e-2)
