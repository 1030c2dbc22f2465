"""The single-file runner: figures as its docstring says, tokens of the model, clear errors."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_bundle import RUNNER, Bundles, copy_with, recompute

from edgedisp.graph.runtime_layouts import for_device


def start(bundle: Path, *options: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUNNER), str(bundle), "--threads", "1", *options]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)


def result(bundle: Path, *options: str, repetitions: int = 1) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts and repetitions."""
    process = start(bundle, *options, stdin='{"run": 1}\n' * repetitions)
    assert process.returncode == 0, process.stderr
    ready, *rows = map(json.loads, process.stdout.splitlines())
    return ready["ready"], rows


def test_figures_follow_from_the_times_of_the_tokens(bundles: Bundles) -> None:
    facts, rows = result(bundles["fp32"], "--prompt", "12", "--generate", "7", repetitions=3)
    assert len(rows) == 3
    for row in rows:
        assert len(row["token_ms"]) == 6
        assert row["decode_tokens_per_s"] == pytest.approx(6 / (sum(row["token_ms"]) / 1000))
        assert row["prefill_tokens_per_s"] == pytest.approx(12 / (row["ttft_ms"] / 1000))
        assert row["ttft_ms"] + sum(row["token_ms"]) <= row["wall_s"] * 1000
    # 2 (key and value) x 2 layers x 2 heads x 16 x 4 bytes
    assert facts["kv_cache_bytes_per_position"] == 2 * 2 * 2 * 16 * 4
    assert facts["weights_bytes"] == sum(f.stat().st_size for f in bundles["fp32"].glob("model.onnx*"))


@pytest.mark.parametrize("shared", [True, False])
def test_tokens_equal_those_without_a_cache(bundles: Bundles, tmp_path: Path, shared: bool) -> None:
    bundle = copy_with(bundles["fp32"], tmp_path / "b", search__past_present_share_buffer=shared)
    facts, rows = result(bundle, "--prompt", "9", "--generate", "12", "--seed", "3", repetitions=2)
    assert facts["kv_cache_shared_buffer"] is shared
    prompt = np.random.default_rng(3).integers(0, facts["vocab_size"], (1, 9), dtype=np.int64)
    expected = recompute(bundles["fp32"], prompt[0].tolist(), 12)
    assert len(set(expected)) > 3  # a model that repeats one token would prove nothing
    # The second repetition starts with a cache full of the first one's keys and values.
    assert [row["tokens"] for row in rows] == [expected, expected]


def test_positions_are_fed_where_the_graph_asks_for_them(bundles: Bundles, tmp_path: Path) -> None:
    bundle = copy_with(bundles["fp32"], tmp_path / "positions")
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    last = next(n for n in model.graph.node if "logits" in n.output)
    last.output[0] = "logits_of_the_model"
    positions = onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, ["b", "s"])
    model.graph.input.append(positions)
    vocab = model.graph.output[0].type.tensor_type.shape.dim[2].dim_value
    for name, value in (("depth", np.array(vocab)), ("off_on", np.array([0, 1], np.float32))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    model.graph.node.append(onnx.helper.make_node("OneHot", ["position_ids", "depth", "off_on"], ["logits"]))
    onnx.save(model, str(bundle / "model.onnx"))
    _, (row,) = result(bundle, "--prompt", "5", "--generate", "4")
    assert row["tokens"] == [4, 5, 6, 7]  # the likeliest token is the position itself


def test_peak_memory_is_that_of_the_runner_not_of_its_parent(bundles: Bundles) -> None:
    ballast = np.ones(500_000_000, np.uint8)  # a child inherits its parent's ru_maxrss on Linux
    _, (row,) = result(bundles["fp32"], "--prompt", "4", "--generate", "2")
    assert 10_000_000 < row["peak_memory_bytes"] < ballast.nbytes


def test_it_answers_line_by_line_and_survives_nonsense(bundles: Bundles) -> None:
    commands = '{"run": 1}\nnonsense\n{"jump": 1}\n{"run": 1}\n'
    process = start(bundles["fp32"], "--prompt", "4", "--generate", "3", stdin=commands)
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert process.returncode == 0
    assert [next(iter(line)) for line in lines] == ["ready", "ttft_ms", "error", "error", "ttft_ms"]
    assert lines[1]["tokens"] == lines[4]["tokens"]


def refused(bundle: Path, *options: str) -> str:
    process = start(bundle, *options)
    assert (process.returncode, process.stdout) == (2, "")
    return process.stderr


def test_bad_bundles_end_with_code_2_and_say_why(bundles: Bundles, tmp_path: Path) -> None:
    assert "holds no model.onnx" in refused(tmp_path)
    assert "context is 256" in refused(bundles["fp32"], "--prompt", "250", "--generate", "20")
    headless = copy_with(bundles["fp32"], tmp_path / "headless", model__decoder__head_size=None)
    assert "model.decoder.head_size" in refused(headless)
    (headless / "genai_config.json").write_text("{")
    assert "not readable as JSON" in refused(headless)
    broken = copy_with(bundles["fp32"], tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"no graph")
    assert "onnxruntime cannot open it" in refused(broken)
    other = copy_with(bundles["fp32"], tmp_path / "other")
    model = onnx.load(str(other / "model.onnx"), load_external_data=False)
    model.graph.input.append(onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, [1]))
    onnx.save(model, str(other / "model.onnx"))
    assert "pixels" in refused(other)


def test_bad_options_end_with_code_2(bundles: Bundles) -> None:
    for option in ("--generate=1", "--prompt=x", "--threads=-2"):
        assert option.split("=")[0] in refused(bundles["fp32"], option)


def test_it_is_one_file_for_python_3_9_with_numpy_and_onnxruntime_alone() -> None:
    tree = ast.parse(RUNNER.read_text(encoding="utf-8"), feature_version=(3, 9))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    names = [alias.name for node in nodes for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported = {name.split(".")[0] for name in names}
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Match)]


def test_scores_are_those_of_the_whole_sequence(bundles: Bundles, tmp_path: Path) -> None:
    (tmp_path / "last").mkdir()
    for_device(bundles["fp32"], tmp_path / "last", threads=1)
    requests = [[[3, 7, 11], [2, 9, 30]], [[3, 7, 11], [4]], [[8], [9]]]
    expected = [plain_log_prob(bundles["fp32"], *request) for request in requests]
    for bundle in (bundles["fp32"], tmp_path / "last"):
        lines = json.dumps({"score": requests}) + '\n{"score": [[[1], []]]}\n{"nothing": 1}\n'
        process = start(bundle, "--positions", "8", stdin=lines)
        ready, answer, *refused = map(json.loads, process.stdout.splitlines())
        assert "ready" in ready and ["error" in line for line in refused] == [True, True]
        assert [greedy for _, greedy in answer["scores"]] == [greedy for _, greedy in expected]
        np.testing.assert_allclose([s for s, _ in answer["scores"]], [s for s, _ in expected], atol=1e-3)


def plain_log_prob(bundle: Path, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    past = [i for i in session.get_inputs() if i.name.startswith("past")]
    empty = {i.name: np.zeros((1, i.shape[1], 0, 16), np.float32) for i in past}
    ids = [*context, *continuation]
    feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    logits = np.asarray(session.run(["logits"], {**feed, **empty})[0][0], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = range(len(context) - 1, len(ids) - 1)
    greedy = all(int(logits[row].argmax()) == ids[row + 1] for row in rows)
    return float(sum(log_probs[row, ids[row + 1]] for row in rows)), greedy


def test_it_describes_the_machine_without_numpy() -> None:
    bare = [sys.executable, "-I", "-S", str(RUNNER), "--describe"]
    machine = json.loads(subprocess.run(bare, capture_output=True, text=True, check=True).stdout)
    assert machine["physical_cores"] >= 1 and machine["packages"] == {"numpy": None, "onnxruntime": None}
