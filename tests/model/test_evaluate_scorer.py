"""A bundle is scored with the file that ships: a plain onnxruntime run gives every log-probability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import onnxruntime
import pytest
from scipy.special import log_softmax

from edgedisp.evaluate.loglikelihood import Request, loglikelihoods
from edgedisp.graph.device_graph import for_device
from edgedisp.graph.export import export
from edgedisp.graph.session import OnnxModel
from edgedisp.models import TorchModel
from edgedisp.quantize.onnx_rewrite import quantize_bundle


def questions(count: int, seed: int = 0) -> list[Request]:
    """Requests, four choices a context; contexts come in pairs that begin alike."""
    rng = np.random.default_rng(seed)
    requests: list[Request] = []
    for _ in range(count // 2):
        shared = rng.integers(0, twins.VOCABULARY, rng.integers(2, 40)).tolist()
        for _ in range(2):
            context = shared + rng.integers(0, twins.VOCABULARY, rng.integers(1, 20)).tolist()
            for _ in range(4):
                requests.append((context, rng.integers(0, twins.VOCABULARY, rng.integers(1, 6)).tolist()))
    return requests


def plain_run(bundle: Path, requests: list[Request], threads: int = 1) -> list[list[float]]:
    """Every continuation token's log-probability, by onnxruntime alone on the bundle's own file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(bundle / "model.onnx", options, providers=["CPUExecutionProvider"])
    found = []
    for context, continuation in requests:
        row = np.array([[*context, *continuation[:-1]]], np.int64)
        feed = {"input_ids": row, "attention_mask": np.ones_like(row)}
        for value in session.get_inputs():
            if value.name.startswith("past_key_values."):
                feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        logits = session.run(["logits"], feed)[0][0, len(context) - 1 :].astype(np.float64)
        found.append(log_softmax(logits, -1)[np.arange(len(continuation)), list(continuation)].tolist())
    return found


def largest(first: list[Any], second: list[Any]) -> float:
    """Largest difference of a token's log-probability."""
    lists = [[one.logprobs if hasattr(one, "logprobs") else one for one in side] for side in (first, second)]
    return max(float(np.abs(np.subtract(a, b)).max()) for a, b in zip(*lists, strict=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    twins.make(root / "model", "llama")
    names = {"fp32": (0, 0), "int4": (4, 4), "int8": (8, 4), "int4-exact": (4, 0)}
    for name in names:
        (root / name).mkdir()
    export(root / "model", root / "fp32", threads=1)
    for name, (bits, level) in names.items():
        if bits:
            quantize_bundle(root / "fp32", root / name, bits=bits, group=32, accuracy_level=level)
    return {name: root / name for name in names}


@pytest.mark.parametrize("name", ["fp32", "int4", "int8", "int4-exact"])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_log_probability_is_that_of_a_plain_run_of_the_shipped_file(
    folders: dict[str, Path], name: str, threads: int
) -> None:
    requests = questions(8)
    found = loglikelihoods(OnnxModel(folders[name], threads), requests)
    assert largest(found, plain_run(folders[name], requests)) < 1e-5
    assert largest(found, plain_run(folders[name], requests, threads=2)) < 1e-5


def test_a_score_in_int8_arithmetic_depends_neither_on_other_requests_nor_on_the_order(
    folders: dict[str, Path],
) -> None:
    requests = questions(12)
    together = loglikelihoods(OnnxModel(folders["int4"], 3), requests)
    bundle = OnnxModel(folders["int4"], 1)
    assert together == loglikelihoods(bundle, requests[::-1])[::-1]
    assert together == [loglikelihoods(bundle, [request])[0] for request in requests]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_torch_and_its_bundle_give_one_answer_up_to_the_whole_context(family: str, tmp_path: Path) -> None:
    model = TorchModel(twins.make(tmp_path / "model", family), threads=1)
    (tmp_path / "fp32").mkdir()
    export(tmp_path / "model", tmp_path / "fp32", threads=1)
    whole = np.random.default_rng(2).integers(0, twins.VOCABULARY, twins.CONTEXT + 1).tolist()
    requests = [*questions(4), (whole[:-5], whole[-5:])]
    assert (
        largest(loglikelihoods(model, requests), loglikelihoods(OnnxModel(tmp_path / "fp32", 1), requests))
        < 1e-3
    )


def test_a_bundle_packed_for_a_device_reads_continuations_through_its_cache(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for_device(folders["int4-exact"], tmp_path, threads=1)
    packed, requests = OnnxModel(tmp_path, 2), questions(4)
    assert packed.last_only
    assert largest(loglikelihoods(packed, requests), plain_run(folders["int4-exact"], requests)) < 1e-4
