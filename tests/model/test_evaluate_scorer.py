"""A bundle is scored with the file that ships: a plain onnxruntime run gives every log-probability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from graph_twins import CONTEXT, VOCABULARY, TwinStore
from scipy.special import log_softmax

from edgedisp.evaluate.loglikelihood import Request, loglikelihoods
from edgedisp.graph.runtime_layouts import for_device
from edgedisp.graph.session import OnnxModel
from edgedisp.pipeline.measure import TokenByToken


def questions(count: int, seed: int = 0) -> list[Request]:
    """Requests, four choices a context; contexts come in pairs that begin alike."""
    rng = np.random.default_rng(seed)
    requests: list[Request] = []
    for _ in range(count // 2):
        shared = rng.integers(0, VOCABULARY, rng.integers(2, 40)).tolist()
        for _ in range(2):
            context = shared + rng.integers(0, VOCABULARY, rng.integers(1, 20)).tolist()
            for _ in range(4):
                requests.append((context, rng.integers(0, VOCABULARY, rng.integers(1, 6)).tolist()))
    return requests


def plain_run(bundle: Path, requests: list[Request], threads: int = 1) -> list[list[float]]:
    """Every continuation token's log-probability, by onnxruntime alone on the bundle's own file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(bundle / "model.onnx", options, providers=["CPUExecutionProvider"])
    results = []
    for context, continuation in requests:
        row = np.array([[*context, *continuation[:-1]]], np.int64)
        feed = {"input_ids": row, "attention_mask": np.ones_like(row)}
        for value in session.get_inputs():
            if value.name.startswith("past_key_values."):
                feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        logits = session.run(["logits"], feed)[0][0, len(context) - 1 :].astype(np.float64)
        results.append(log_softmax(logits, -1)[np.arange(len(continuation)), list(continuation)].tolist())
    return results


def largest(first: list[Any], second: list[Any]) -> float:
    """Largest difference of a token's log-probability."""
    sides = [[getattr(score, "logprobs", score) for score in side] for side in (first, second)]
    return max(float(np.abs(np.subtract(a, b)).max()) for a, b in zip(*sides, strict=True))


@pytest.mark.parametrize(("bits", "level"), [(32, 0), (4, 4), (8, 4), (4, 0)])
def test_log_probs_equal_a_plain_run_of_the_shipped_file(twins: TwinStore, bits: int, level: int) -> None:
    bundle = twins.fp32() if bits == 32 else twins.quantized(bits=bits, accuracy_level=level)
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, CONTEXT + 1).tolist()
    requests = [*questions(8), (tokens[:-5], tokens[-5:])]  # the last fills the context
    plain = [plain_run(bundle, requests, threads) for threads in (1, 2)]
    for threads in (1, 2):
        results = loglikelihoods(OnnxModel(bundle, threads), requests)
        assert max(largest(results, reference) for reference in plain) < 1e-5


def test_a_score_in_int8_arithmetic_depends_on_its_request_alone(twins: TwinStore) -> None:
    bundle, requests = twins.quantized(bits=4, accuracy_level=4), questions(12)
    together, model = loglikelihoods(OnnxModel(bundle, 3), requests), OnnxModel(bundle, 1)
    assert together == loglikelihoods(model, requests[::-1])[::-1]
    assert together == [loglikelihoods(model, [request])[0] for request in requests]


def test_a_device_bundle_reads_continuations_through_its_cache(twins: TwinStore, tmp_path: Path) -> None:
    bundle = twins.quantized(bits=4, accuracy_level=0)
    for_device(bundle, tmp_path, threads=1)
    packed, requests = OnnxModel(tmp_path, 2), questions(4)
    assert packed.last_only
    assert largest(loglikelihoods(packed, requests), plain_run(bundle, requests)) < 1e-4


def test_reading_the_first_half_at_once_is_another_order_of_summation(
    twins: TwinStore, tmp_path: Path
) -> None:
    """Else the noise floor of a device bundle would be 0."""
    for_device(twins.quantized(bits=4, accuracy_level=4), tmp_path, threads=1)
    packed, ids = OnnxModel(tmp_path, 1), np.random.default_rng(2).integers(0, VOCABULARY, 40)
    usual, other = packed.logits(ids, 39), TokenByToken(packed).logits(ids, 39)
    assert usual.shape == other.shape and not np.array_equal(usual, other)
    assert np.abs(usual - other).max() < 0.2 * np.abs(usual).max()
