"""Forests of tokens: planted right, read alike by torch and by bundles; no score depends on a neighbour."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from edgedisp.evaluate import forest, score
from edgedisp.evaluate.score import Request, loglikelihoods
from edgedisp.graph.device_graph import for_device
from edgedisp.graph.export import export
from edgedisp.graph.session import OnnxModel
from edgedisp.models import TorchModel
from edgedisp.quantize.onnx_rewrite import quantize_bundle

ROWS = st.sets(st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple), min_size=1, max_size=12)


@given(ROWS)
def test_a_node_sees_what_stands_before_it_in_its_sequence_and_itself(rows: set[tuple[int, ...]]) -> None:
    planted = forest.plant(list(rows))
    places = np.arange(len(planted.ids))
    seen = (places <= places[:, None]) & (places[:, None] < planted.ends)
    for row, path in planted.paths.items():
        assert tuple(planted.ids[path]) == row
        assert planted.depths[path].tolist() == [*range(len(row))]
        for depth, node in enumerate(path):
            assert np.flatnonzero(seen[node]).tolist() == path[: depth + 1]


@given(ROWS)
def test_each_beginning_has_one_node(rows: set[tuple[int, ...]]) -> None:
    beginnings = {row[:end] for row in rows for end in range(1, len(row) + 1)}
    assert len(forest.plant(list(rows)).ids) == len(beginnings)


@given(ROWS, st.integers(1, 20), st.integers(1, 10))
def test_parts_hold_all_sequences_and_stay_within_the_limits(
    rows: set[tuple[int, ...]], most_nodes: int, most_wanted: int
) -> None:
    wanted = {row: len(row) // 2 + 1 for row in rows}
    parts = list(forest.parted(wanted, most_nodes, most_wanted))
    assert [row for part in parts for row in part] == sorted(rows)
    for part in parts:
        fits = len(forest.plant(list(part)).ids) <= most_nodes and sum(part.values()) <= most_wanted
        assert fits or len(part) == 1


class Plain:
    """The same model, which reads no trees."""

    tree_nodes, packs = 0, True

    def __init__(self, model: Any) -> None:
        self.model, self.vocab_size, self.context = model, model.vocab_size, model.context

    def __call__(self, ids: Any, mask: Any) -> Any:
        return self.model(ids, mask)

    def tree(self, ids: Any, depths: Any, ends: Any, wanted: Any) -> Any:
        raise NotImplementedError

    def greedy(self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        raise NotImplementedError


def questions(count: int, seed: int = 0) -> tuple[list[Request], list[int]]:
    """Requests, four choices a context, and the question of each; contexts come in pairs that begin alike."""
    rng = np.random.default_rng(seed)
    asked: list[Request] = []
    for _ in range(count // 2):
        shared = rng.integers(0, twins.VOCABULARY, rng.integers(2, 40)).tolist()
        for _ in range(2):
            context = shared + rng.integers(0, twins.VOCABULARY, rng.integers(1, 20)).tolist()
            for _ in range(4):
                asked.append((context, rng.integers(0, twins.VOCABULARY, rng.integers(1, 6)).tolist()))
    return asked, [number // 4 for number in range(len(asked))]


def largest(first: Any, second: Any) -> float:
    """Difference of a token's log-probability."""
    return max(
        float(np.abs(np.subtract(one.logprobs, other.logprobs)).max())
        for one, other in zip(first, second, strict=True)
    )


@pytest.fixture(scope="module", params=twins.FORMS)
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("twin")
    model = twins.make(folder / "model", request.param)
    (folder / "fp32").mkdir()
    export(folder / "model", folder / "fp32", threads=1)
    return model, folder / "fp32"


def test_torch_scores_a_forest_as_the_sequences_alone(twin: tuple[Any, Path]) -> None:
    model = TorchModel(twin[0], threads=1)
    requests, items = questions(8)
    assert model.tree_nodes == twins.CONTEXT
    for batch_tokens in (50, 1000):
        found = loglikelihoods(model, requests, items=items, batch_tokens=batch_tokens)
        assert largest(found, loglikelihoods(Plain(model), requests)) < 1e-4


def test_a_bundle_scores_a_forest_as_the_sequences_alone(twin: tuple[Any, Path]) -> None:
    bundle = OnnxModel(twin[1], 1)
    requests, items = questions(8)
    assert bundle.tree_nodes == twins.CONTEXT - 1
    found = loglikelihoods(bundle, requests, items=items)
    assert largest(found, loglikelihoods(Plain(bundle), requests)) < 1e-4
    assert largest(found, loglikelihoods(TorchModel(twin[0], 1), requests)) < 1e-3


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4")
    twins.make(folder / "model", "llama")
    for name in ("fp32", "int4"):
        (folder / name).mkdir()
    export(folder / "model", folder / "fp32", threads=1)
    quantize_bundle(folder / "fp32", folder / "int4", bits=4, group=32, accuracy_level=4)
    return folder / "int4"


def test_a_bundle_whose_attention_names_empty_inputs_reads_forests_too(int4: Path, tmp_path: Path) -> None:
    # onnxruntime-genai's builder writes all twelve inputs, the last ones empty.
    folder = tmp_path / "named"
    shutil.copytree(int4, folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input.extend([""] * (12 - len(node.input)))
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    requests, items = questions(4)
    plain, named = OnnxModel(int4, 1), OnnxModel(folder, 1)
    assert named.tree_nodes == plain.tree_nodes > 0
    found = loglikelihoods(named, requests, items=items)
    assert largest(found, loglikelihoods(plain, requests, items=items)) == 0


def test_gpt_neo_which_masks_by_places_in_the_row_reads_no_forest() -> None:
    config = GPTNeoConfig(
        vocab_size=50,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TorchModel(GPTNeoForCausalLM(config).eval(), threads=1)
    assert model.tree_nodes == 0
    requests = [([0, 1], [k, 3, 4, k]) for k in range(2, 30)]
    alone = [loglikelihoods(model, [request])[0] for request in requests]
    assert largest(loglikelihoods(model, requests), alone) < 1e-4


def test_a_score_in_int8_arithmetic_does_not_depend_on_what_else_is_asked(int4: Path) -> None:
    bundle = OnnxModel(int4, 1)
    requests, items = questions(12)
    together = loglikelihoods(bundle, requests, items=items)
    backwards = loglikelihoods(bundle, requests[::-1], items=items[::-1], batch_tokens=32)[::-1]
    alone = [
        one
        for item in dict.fromkeys(items)
        for one in loglikelihoods(bundle, [r for r, i in zip(requests, items) if i == item], items=[item] * 4)
    ]
    assert [one.logprobs for one in together] == [one.logprobs for one in backwards]
    assert [one.logprobs for one in together] == [one.logprobs for one in alone]


def test_items_scored_side_by_side_have_the_scores_that_they_have_one_after_the_other(int4: Path) -> None:
    requests, items = questions(12)
    one, three = (loglikelihoods(OnnxModel(int4, threads), requests, items=items) for threads in (1, 3))
    assert [found.logprobs for found in one] == [found.logprobs for found in three]


@given(st.lists(st.integers(0, 99), max_size=30), st.integers(1, 4))
def test_side_by_side_keeps_the_order_and_a_bounded_number_in_hand(jobs: list[int], lanes: int) -> None:
    begun: list[int] = []

    def work(job: int) -> int:
        begun.append(job)
        return job * job

    for number, result in enumerate(score._side_by_side(work, iter(jobs), lanes)):
        assert result == jobs[number] ** 2
        assert len(begun) <= number + 1 + lanes
    assert sorted(begun) == sorted(jobs)


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_failure_side_by_side_is_not_lost(lanes: int) -> None:
    def work(job: int) -> int:
        if job == 2:
            raise ValueError("two")
        return job

    with pytest.raises(ValueError, match="two"):
        list(score._side_by_side(work, range(9), lanes))


def test_a_bundle_packed_for_a_device_is_scored_as_well(int4: Path, tmp_path: Path) -> None:
    for_device(int4, tmp_path, threads=1)
    requests, items = questions(4)
    before, after = (loglikelihoods(OnnxModel(place, 1), requests, items=items) for place in (int4, tmp_path))
    assert [one.logprobs for one in before] == [one.logprobs for one in after]


def test_a_sequence_as_long_as_the_context_is_scored(twin: tuple[Any, Path]) -> None:
    rng = np.random.default_rng(2)
    whole = rng.integers(0, twins.VOCABULARY, twins.CONTEXT + 1).tolist()
    requests = [(whole[:-5], whole[-5:]), (whole[1:-5], whole[-5:])]
    for model in (TorchModel(twin[0], 1), OnnxModel(twin[1], 1)):
        assert largest(loglikelihoods(model, requests), loglikelihoods(Plain(model), requests)) < 1e-4
