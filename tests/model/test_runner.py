"""The single-file runner: figures as its docstring says, tokens of the model, clear errors."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_bundle import RUNNER, copy_with, recompute, tiny_bundles


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_bundles(tmp_path_factory.getbasetemp())


def start(bundle: Path, *options: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUNNER), str(bundle), "--threads", "1", *options]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)


def result(bundle: Path, *options: str) -> dict[str, Any]:
    done = start(bundle, *options)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return dict(json.loads(done.stdout))


def test_figures_follow_from_the_times_of_the_tokens(bundles: dict[str, Path]) -> None:
    found = result(bundles["fp32"], "--prompt", "12", "--generate", "7", "--repetitions", "3")
    assert len(found["repetitions"]) == 3
    for one in found["repetitions"]:
        assert len(one["token_ms"]) == 7 - 1
        assert one["decode_tokens_per_s"] == pytest.approx(6 / (sum(one["token_ms"]) / 1000))
        assert one["prefill_tokens_per_s"] == pytest.approx(12 / (one["ttft_ms"] / 1000))
        assert one["ttft_ms"] + sum(one["token_ms"]) <= one["wall_s"] * 1000
    for name in ("ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s"):
        assert found[name] == pytest.approx(np.median([one[name] for one in found["repetitions"]]))
    pooled = [t for one in found["repetitions"] for t in one["token_ms"]]
    assert found["token_ms_p50"] == pytest.approx(np.percentile(pooled, 50))
    assert found["token_ms_p90"] == pytest.approx(np.percentile(pooled, 90))


def test_facts_are_those_of_the_bundle(bundles: dict[str, Path]) -> None:
    found = result(bundles["fp32"], "--prompt", "4", "--generate", "2", "--repetitions", "1")
    files = [bundles["fp32"] / "model.onnx", bundles["fp32"] / "model.onnx.data"]
    assert found["weights_bytes"] == sum(f.stat().st_size for f in files)
    # 2 (key and value) x 2 layers x 2 heads x 16 x 4 bytes
    assert found["kv_cache_bytes_per_position"] == 2 * 2 * 2 * 16 * 4
    assert (found["threads"], found["prompt"], found["generate"]) == (1, 4, 2)


@pytest.mark.parametrize("shared", [True, False])
def test_tokens_with_the_cache_equal_the_recompute_without(
    bundles: dict[str, Path], tmp_path: Path, shared: bool
) -> None:
    bundle = copy_with(bundles["fp32"], tmp_path / "b", search__past_present_share_buffer=shared)
    options = ["--prompt", "9", "--generate", "12", "--seed", "3", "--repetitions", "2"]
    found = result(bundle, *options)
    assert found["kv_cache_shared_buffer"] is shared
    prompt = np.random.default_rng(3).integers(0, found["vocab_size"], (1, 9), dtype=np.int64)
    expected = recompute(bundles["fp32"], prompt[0].tolist(), 12)
    assert len(set(expected)) > 3  # a model that repeats one token would prove nothing
    # The second repetition starts with a cache full of the first one's keys and values.
    assert [one["tokens"] for one in found["repetitions"]] == [expected, expected]


def test_positions_are_fed_where_the_graph_asks_for_them(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "positions"
    shutil.copytree(bundles["fp32"], bundle)
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    last = next(n for n in model.graph.node if "logits" in n.output)
    last.output[0] = "logits_of_the_model"
    positions = onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, ["b", "s"])
    model.graph.input.append(positions)
    vocab = model.graph.output[0].type.tensor_type.shape.dim[2].dim_value
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(vocab), "depth"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 1], np.float32), "off_on"))
    model.graph.node.append(onnx.helper.make_node("OneHot", ["position_ids", "depth", "off_on"], ["logits"]))
    onnx.save(model, str(bundle / "model.onnx"))
    found = result(bundle, "--prompt", "5", "--generate", "4", "--repetitions", "1")
    assert found["repetitions"][0]["tokens"] == [4, 5, 6, 7]  # the likeliest token is the position itself


def test_the_prompt_depends_on_the_seed_alone(bundles: dict[str, Path]) -> None:
    def tokens(seed: str) -> list[int]:
        options = ["--prompt", "8", "--generate", "6", "--repetitions", "1", "--seed", seed]
        return list(result(bundles["fp32"], *options)["repetitions"][0]["tokens"])

    assert tokens("1") == tokens("1")
    assert tokens("1") != tokens("2")


def test_threads_come_from_the_bundle_where_none_are_asked_for(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    options = {"intra_op_num_threads": 1, "log_id": "x"}
    bundle = copy_with(bundles["fp32"], tmp_path / "b", model__decoder__session_options=options)
    command = [
        sys.executable,
        str(RUNNER),
        str(bundle),
        "--prompt",
        "2",
        "--generate",
        "2",
        "--repetitions",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["threads"] == 1


def test_peak_memory_is_that_of_the_runner_not_of_its_parent(bundles: dict[str, Path]) -> None:
    ballast = np.ones(500_000_000, np.uint8)  # a child inherits its parent's ru_maxrss on Linux
    found = result(bundles["fp32"], "--prompt", "4", "--generate", "2", "--repetitions", "1")
    assert 10_000_000 < found["peak_memory_bytes"] < ballast.nbytes


def test_interactive_answers_line_by_line_and_survives_nonsense(bundles: dict[str, Path]) -> None:
    commands = '{"run": 1}\nnonsense\n{"jump": 1}\n\n{"run": 1}\n{"quit": 1}\n{"run": 1}\n'
    options = ["--interactive", "--prompt", "4", "--generate", "3"]
    done = start(bundles["fp32"], *options, stdin=commands)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert list(lines[0]) == ["ready"]
    assert [next(iter(line)) for line in lines[1:]] == ["ttft_ms", "error", "error", "ttft_ms"]
    assert lines[1]["tokens"] == lines[4]["tokens"]


def test_interactive_ends_when_its_input_does(bundles: dict[str, Path]) -> None:
    done = start(bundles["fp32"], "--interactive", "--prompt", "4", "--generate", "3")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1


def refused(bundle: Path, *options: str) -> str:
    done = start(bundle, *options)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def test_bad_bundles_end_with_code_2_and_say_why(bundles: dict[str, Path], tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no model.onnx" in refused(tmp_path / "empty")
    assert "context is 256" in refused(bundles["fp32"], "--prompt", "250", "--generate", "20")
    headless = copy_with(bundles["fp32"], tmp_path / "headless", model__decoder__head_size=None)
    assert "model.decoder.head_size" in refused(headless)
    (headless / "genai_config.json").write_text("{")
    assert "not readable as JSON" in refused(headless)
    broken = copy_with(bundles["fp32"], tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"no graph")
    assert "onnxruntime cannot open it" in refused(broken)


def test_a_graph_with_an_unknown_input_is_refused_by_name(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = copy_with(bundles["fp32"], tmp_path / "b")
    model = onnx.load(str(bundle / "model.onnx"), load_external_data=False)
    model.graph.input.append(onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, [1]))
    onnx.save(model, str(bundle / "model.onnx"))
    assert "pixels" in refused(bundle)


@pytest.mark.parametrize("option", ["--generate=1", "--prompt=0", "--repetitions=x", "--threads=-2"])
def test_bad_options_end_with_code_2(bundles: dict[str, Path], option: str) -> None:
    assert option.split("=")[0] in refused(bundles["fp32"], option)


def test_it_is_one_file_for_python_3_9_with_numpy_and_onnxruntime_alone() -> None:
    tree = ast.parse(RUNNER.read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Match)]


# ---------------------------------------------------------------- page cache, energy, logits


def runner_module() -> Any:
    spec = importlib.util.spec_from_file_location("edgedisp_runner", RUNNER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what is in its page cache")
def test_files_that_were_read_are_in_the_page_cache(bundles: dict[str, Path]) -> None:
    options = ["--prompt", "4", "--generate", "2", "--repetitions", "1", "--page-cache", "warm"]
    found = result(bundles["fp32"], *options)
    assert found["page_cache"] == "warm" and found["cached_share"] == 1.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what is in its page cache")
def test_the_share_in_memory_falls_when_the_system_forgets_and_rises_when_it_is_read(tmp_path: Path) -> None:
    runner = runner_module()
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    assert runner.prepare_page_cache([tmp_path / "a"], "warm") == 1.0
    assert runner.prepare_page_cache([tmp_path / "a"], "found") == 1.0
    share = runner.prepare_page_cache([tmp_path / "a"], "dropped")
    assert share in (0.0, 1.0)  # 1 on file systems that live in memory: then no load is called cold
    assert runner.prepare_page_cache([tmp_path / "a"], "warm") == 1.0


def powercap(root: Path, **zones: tuple[str, int]) -> Path:
    for zone, (name, energy) in zones.items():
        folder = root / zone.replace("_", ":").replace("rapl", "intel-rapl")
        folder.mkdir(exist_ok=True)
        (folder / "name").write_text(name + "\n")
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text("1000000\n")
    return root


def test_energy_is_the_sum_of_the_packages_over_a_counter_that_starts_again(tmp_path: Path) -> None:
    runner = runner_module()
    root = powercap(tmp_path, rapl_0=("package-0", 900_000), rapl_1=("package-1", 5), rapl_0_0=("core", 1))
    zones = runner.energy_zones(root)
    assert [zone.name for zone in zones] == ["intel-rapl:0", "intel-rapl:1"]
    before = runner.energy_uj(zones)
    powercap(tmp_path, rapl_0=("package-0", 100_000), rapl_1=("package-1", 500_005))
    assert runner.energy_j(zones, before, runner.energy_uj(zones)) == pytest.approx(0.2 + 0.5)


def test_without_a_readable_counter_there_is_no_energy(tmp_path: Path) -> None:
    runner = runner_module()
    assert runner.energy_zones(tmp_path) == [] and runner.energy_j([], None, None) is None
    root = powercap(tmp_path, rapl_0=("package-0", 1))
    (root / "intel-rapl:0" / "energy_uj").unlink()
    assert runner.energy_zones(root) == []


def written_logits(bundle: Path, tmp_path: Path, ids: list[int], *options: str) -> np.ndarray[Any, Any]:
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    out = tmp_path / "logits.npy"
    done = start(bundle, "--logits", str(tmp_path / "ids.json"), "--out", str(out), *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == len(ids)
    return np.load(out)


def plain_logits(bundle: Path, ids: list[int]) -> np.ndarray[Any, Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    past = [i for i in session.get_inputs() if i.name.startswith("past")]
    empty = {i.name: np.zeros((1, i.shape[1], 0, 16), np.float32) for i in past}
    feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    return np.asarray(session.run(["logits"], {**feed, **empty})[0][0])


def test_logits_are_the_graphs_own(bundles: dict[str, Path], tmp_path: Path) -> None:
    ids = [3, 7, 11, 2, 9, 30]
    found = written_logits(bundles["fp32"], tmp_path, ids)
    assert found.dtype == np.float32 and found.shape[0] == len(ids)
    np.testing.assert_allclose(found, plain_logits(bundles["fp32"], ids), atol=1e-4)


def test_a_graph_for_the_last_token_alone_gives_the_same_logits_one_by_one(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    from edgedisp.graph.device_graph import for_device

    (tmp_path / "last").mkdir()
    for_device(bundles["fp32"], tmp_path / "last", threads=1)
    ids = [3, 7, 11, 2, 9, 30]
    found = written_logits(tmp_path / "last", tmp_path, ids)
    np.testing.assert_allclose(found, plain_logits(bundles["fp32"], ids), atol=1e-3)


def test_session_options_reach_onnxruntime(bundles: dict[str, Path], tmp_path: Path) -> None:
    written_logits(bundles["int4"], tmp_path, [1, 2], "--session", "mlas.disable_kleidiai=1")
    assert start(bundles["int4"], "--session", "nonsense").returncode == 2


@pytest.mark.parametrize(
    ("content", "said"), [("[]", "at least one"), ("[1, -2]", "list"), ("{", "JSON"), ("[99999]", "99999")]
)
def test_ids_that_cannot_be_are_refused(
    bundles: dict[str, Path], tmp_path: Path, content: str, said: str
) -> None:
    (tmp_path / "ids.json").write_text(content)
    out = tmp_path / "x.npy"
    done = start(bundles["fp32"], "--logits", str(tmp_path / "ids.json"), "--out", str(out))
    assert done.returncode == 2 and said in done.stderr and not out.exists()
