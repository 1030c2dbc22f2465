"""The real command on a tiny model, through every stage; stopped, changed and misused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import pytest
from tiny_build import Built, Command, Ended, write_recipe

from edgedisp.core.files import check_files, read_json, sealed
from edgedisp.core.stage_folder import Record, read
from edgedisp.pipeline.run_results import load as load_results
from edgedisp.recipe import load

PROGRAM = Path(sys.executable).parent / "edgedisp"


def record_of(folder: Path) -> Record:
    record = read(folder)
    assert record is not None, folder
    return record


def test_a_build_ends_with_the_report_and_exit_code_0(built: Built) -> None:
    run, ended = built.run, built.ended
    assert ended.code == 0, ended
    assert ended.out.splitlines()[-1] == f"report: {run / 'report.html'}"
    for name in ("report.html", "report.md", "report.json", "recipe.lock.yaml"):
        assert (run / name).is_file()
    assert "Traceback" not in ended.err
    assert not list(run.rglob("*.partial"))
    assert "dispersion" in (run / "dispersed" / "model" / "README.md").read_text()


def test_each_arm_leaves_a_model_folder_and_bundles(built: Built) -> None:
    from transformers import AutoModelForCausalLM

    for arm in ("baseline", "dispersed"):
        folder = built.run / arm
        assert AutoModelForCausalLM.from_pretrained(folder / "model").config.num_hidden_layers == 2
        for precision, op in (("fp32", "MatMul"), ("int8", "MatMulNBits"), ("int4", "MatMulNBits")):
            operators = operators_of(folder / precision)
            assert operators.count("GroupQueryAttention") == 2 and op in operators
            assert threads_of(folder / precision) == 1


def operators_of(bundle: Path) -> list[str]:
    """Of the nodes in order, without those that take the last token's logits alone."""
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    return [node.op_type for node in graph.node if "last_token" not in node.name]


def threads_of(bundle: Path) -> int:
    config = json.loads((bundle / "genai_config.json").read_text())
    threads: int = config["model"]["decoder"]["session_options"]["intra_op_num_threads"]
    return threads


def test_the_bundle_for_a_device_is_the_one_that_was_measured_and_says_where_it_comes_from(
    built: Built,
) -> None:
    dispersed, recipe = built.run / "dispersed", load(built.recipe)
    packed, measured = record_of(dispersed / "phone-arm64"), record_of(dispersed / "int4")
    for name in ("model.onnx.data", "tokenizer.json"):
        assert packed.sha256(name) == measured.sha256(name)
    assert operators_of(packed.folder) == operators_of(measured.folder) and threads_of(packed.folder) == 4
    check_files(packed.folder)
    assert "README.md" not in packed.files
    manifest = json.loads((packed.folder / "manifest.json").read_text())
    origin = manifest["provenance"]
    assert origin["recipe"] == {"name": "tiny", "hash8": recipe.hash8}
    assert (origin["arm"], origin["seed"], origin["smoke"]) == ("dispersed", 1, False)
    assert origin["data_sha256"] == record_of(built.run / "corpus").results["tokens_sha256"]
    assert origin["weights_sha256"] == record_of(dispersed / "model").results["weights_sha256"]
    assert manifest["base"]["base"] == recipe.model.base
    assert (manifest["grid"]["bits"], manifest["grid"]["method"]) == (4, "rtn")
    card = (packed.folder / "README.md").read_text()
    assert "| int4" in card and "| int8" not in card and "Nothing was measured" not in card
    assert "Licence of the base not found" in card


def test_the_arms_differ_in_the_dispersion_term_alone(built: Built) -> None:
    baseline, dispersed = (record_of(built.run / arm / "model") for arm in ("baseline", "dispersed"))
    assert baseline.key["inputs"] == dispersed.key["inputs"]
    assert baseline.results["settings"] == dispersed.results["settings"]
    assert baseline.key["options"]["arm"]["dispersion"] is None
    assert baseline.results["log"][0]["loss"] == dispersed.results["log"][0]["loss"]
    assert baseline.results["weights_sha256"] != dispersed.results["weights_sha256"]
    assert baseline.results["tokens_per_s"] > 0 and baseline.results["watch_seconds"] > 0


def test_an_unchanged_recipe_runs_nothing_and_says_what_it_kept(built: Built) -> None:
    script = (
        "import sys; from edgedisp.cli import main\n"
        f"sys.argv = ['edgedisp', 'build', {str(built.recipe)!r}, '--out', {str(built.run)!r}]\n"
        "main()\n"
        "print('loaded torch' if 'torch' in sys.modules else 'no torch', file=sys.stderr)"
    )
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "kept 26 finished stages: base, corpus, items" in again.stderr
    assert "no torch" in again.stderr
    assert again.stdout.splitlines()[-1] == f"report: {built.run / 'report.html'}"


def copy_of(built: Built, folder: Path) -> tuple[Path, Path]:
    """Recipe and run folder of a copy that a test may change."""
    shutil.copytree(built.run, folder / "run")
    shutil.copy(built.recipe.parent / "text.jsonl", folder / "text.jsonl")
    return Path(shutil.copy(built.recipe, folder / "tiny.yaml")), folder / "run"


def test_a_report_that_was_edited_or_deleted_is_written_again(
    built: Built, tmp_path: Path, edgedisp: Command
) -> None:
    recipe, run = copy_of(built, tmp_path)
    assert edgedisp("build", recipe, "--out", run).code == 0
    whole, record = (run / "report.json").read_text(), run / "latency" / "record.json"
    later = json.dumps(sealed({**read_json(record), "seconds": 1.0}))
    for path, content, fault in (
        (run / "report" / "made_from.json", "[]", "the writing of the report was cut off"),
        (record, later, "is older than the stage latency"),
        (run / "report.json", whole[:1000], "is no JSON object"),
    ):
        before = path.read_text()
        path.write_text(content)
        refused(edgedisp("compare", run), fault, "`edgedisp build` writes")
        path.write_text(before)
    (run / "report.json").unlink()
    refused(edgedisp("compare", run), "holds no report.json; `edgedisp build` writes")
    (run / "report.html").write_text("")
    assert edgedisp("build", recipe, "--out", run).code == edgedisp("compare", run).code == 0
    assert json.loads((run / "report.json").read_text())["verdict"] == json.loads(whole)["verdict"]
    assert (run / "report.html").stat().st_size


def test_a_changed_precision_retrains_nothing(built: Built, tmp_path: Path, edgedisp: Command) -> None:
    recipe, run = copy_of(built, tmp_path)
    ended = edgedisp("build", recipe, "--out", run, "--set", "quantize.int4.group=16")
    assert ended.code == 0, ended
    again = ("int4", "survival-int4", "measure-int4", "phone-arm64")
    assert ended.stages == {
        "latency",
        *(f"{arm}/{stage}" for arm in ("baseline", "dispersed") for stage in again),
    }
    models = [record_of(folder / "dispersed" / "model") for folder in (built.run, run)]
    assert models[0].content == models[1].content


def test_a_build_killed_in_training_continues_at_its_checkpoint(
    built: Built, tmp_path: Path, edgedisp: Command
) -> None:
    model, run = Path("dispersed") / "model", tmp_path / "run"
    command = [PROGRAM, "build", built.recipe, "--out", run]
    for change in ("precisions=[fp32]", "targets=[]", "evaluate.tasks=[heldout_perplexity]"):
        command += ["--set", change]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = run / "dispersed" / "model.partial" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/edgedisp.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if read(run / model) is None:  # else the run had passed the stage before the signal
        assert not (run / model).exists()
    ended = edgedisp(*command[1:])
    assert ended.code == 0, ended
    assert "kept 4 finished stages: base, corpus, items, baseline/model" in ended.err
    resumed, whole = record_of(run / model).results, record_of(built.run / model).results
    assert resumed["resumed_from"] >= 2 and resumed["weights_sha256"] == whole["weights_sha256"]


def test_an_interrupted_build_ends_with_130_and_says_how_to_go_on(built: Built, tmp_path: Path) -> None:
    command = [PROGRAM, "build", built.recipe, "--out", tmp_path / "run"]
    # A shell starts its background jobs with Ctrl-C ignored, and a test run may be one.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=heed
    )
    assert process.stderr is not None
    assert any("corpus: done" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130, rest
    assert rest.splitlines()[-1] == "edgedisp: interrupted; the same command continues where this one stopped"
    assert "Traceback" not in rest
    assert read(tmp_path / "run" / "corpus") is not None


def test_plan_says_what_is_done_and_estimates_what_is_not(built: Built, edgedisp: Command) -> None:
    ended = edgedisp("plan", built.recipe, "--out", built.run)
    assert ended.code == 0 and "to do" not in ended.out
    plan = json.loads(edgedisp("plan", built.recipe, "--set", "train.tokens=4k", "--json").out)
    assert plan["steps"] == 15 and plan["estimate"]["seconds_left"] > 0
    assert not any(stage["done"] for stage in plan["stages"])
    assert not Path(plan["run"]).exists()
    for precision in ("fp32", "int8", "int4"):
        size = record_of(built.run / "baseline" / precision).results["size_bytes"]
        assert size == pytest.approx(plan["sizes"]["precisions"][precision]["size_bytes"], rel=0.05)
    assert plan["sizes"]["kv_cache"]["phone-arm64"]["positions"] == 256  # the model's, below the target's


def test_the_report_says_what_quantization_left_of_training(built: Built) -> None:
    survival = record_of(built.run / "dispersed" / "survival-int4").results
    assert survival["nearest"] == 1.0
    assert set(survival["references"]) == {"base", "baseline"}
    assert "attention" in survival["references"]["base"]["components"]
    results = load_results(built.run)
    assert set(results.delta_survival["baseline"]) == {"int8", "int4"}
    assert "baseline" not in results.loss_survival
    loss = results.loss_survival["dispersed"]["int4"]["heldout_perplexity"]
    assert loss.change.value == pytest.approx(loss.quantized.value - loss.full.value)  # type: ignore[operator]
    assert "What quantization leaves of training" in (built.run / "report.md").read_text()


def test_what_a_device_measured_joins_the_report_and_a_later_build_keeps_it(
    built: Built, tmp_path: Path, edgedisp: Command
) -> None:
    recipe, run = copy_of(built, tmp_path)
    before_timing = load_results(run)
    sizes = ["--prompt", "8", "--generate", "4", "--repetitions", "2", "--pause", "0", "--threads", "1"]
    ended = edgedisp("bench", run / "baseline" / "int4", run / "dispersed" / "int4", *sizes, "--report")
    assert ended.code == 0 and f"report: {run / 'report.html'} shows it" in ended.err, ended
    results = load_results(run)
    assert [row.label for row in results.devices[0].rows] == ["baseline/int4", "dispersed/int4"]
    assert replace(results, devices=[]) == before_timing  # and nothing else has changed
    files = [run / name for name in ("report.html", "report.md", "report.json")]
    before = [path.read_bytes() for path in files]
    assert b"On devices" in before[0] and b"## On devices" in before[1]
    ended = edgedisp("build", recipe, "--out", run)
    assert "kept 26 finished stages" in ended.err
    assert [path.read_bytes() for path in files] == before
    outside = shutil.copytree(run / "baseline" / "int4", tmp_path / "int4")
    refused(edgedisp("bench", outside, *sizes, "--report"), "lies in no run folder")


def test_export_gives_a_bundle_that_chat_and_bench_open(
    built: Built, tmp_path: Path, edgedisp: Command
) -> None:
    bundle, words = tmp_path / "bundle", ["--target", "phone-arm64", "--out"]
    ended = edgedisp("export", built.run / "dispersed" / "model", *words, bundle)
    assert ended.code == 0 and "opened and checked" in ended.out, ended
    ended = edgedisp("chat", bundle, "--prompt", "Hello", "--max-new-tokens", "4")
    assert ended.code == 0, ended
    words = ["--prompt", "8", "--generate", "4", "--repetitions", "1"]
    ended = edgedisp("bench", bundle, built.run / "baseline" / "int4", *words)
    assert ended.code == 0 and "bundle" in ended.out and "decode t/s" in ended.out, ended


@pytest.mark.parametrize(
    "recipe",
    ["qwen3_0.6b", "gemma3_270m", "gpt2", "pythia_160m", "qwen3_0.6b_qlora", "smollm2_135m_lora"],
)
def test_a_recipe_passes_every_stage_with_its_tiny_twin(
    recipe: str, tmp_path: Path, edgedisp: Command
) -> None:
    ended = edgedisp("build", recipe, "--smoke", "--out", tmp_path / "run")
    assert ended.code == 0, ended
    results = load_results(tmp_path / "run")
    assert results.smoke and set(results.comparisons["dispersed"]) == {"torch", "fp32", "int8", "int4"}


# Damaged files

BUILD = "build {recipe} --out {run} --set"


@pytest.mark.parametrize(("name", "command"), [
    ("corpus/tokens.npy", f"{BUILD} arms=[baseline,dispersed,neftune]"),
    ("base/model.safetensors", f"{BUILD} targets=[laptop-x64]"),
    ("dispersed/int4/model.onnx.data", f"{BUILD} targets=[laptop-x64]"),
    ("dispersed/measure-int4/items.json", "compare {run} {run}"),
    ("dispersed/model/generation_config.json", "export {run}/dispersed/model --out {run}/new"),
    ("dispersed/model/tokenizer.json", "condensation {run}/dispersed/model"),
    ("dispersed/int4/tokenizer.json", "chat {run}/dispersed/int4 --prompt Hello"),
    ("corpus/heldout.jsonl", "bench {run}/dispersed/int4 --score heldout_perplexity"),
])  # fmt: skip
def test_a_changed_byte_is_noticed_by_the_command_that_reads_it(
    name: str, command: str, built: Built, tmp_path: Path, edgedisp: Command
) -> None:
    run = shutil.copytree(built.run, tmp_path / "run")
    content = (run / name).read_bytes()
    middle = len(content) // 2
    (run / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    ended = edgedisp(*command.format(run=run, recipe=built.recipe).split())
    lines = [line for line in ended.err.splitlines() if line.startswith("edgedisp: ")]
    assert ended.code in (1, 2) and ended.out == "" and len(lines) == 1, ended
    assert f"{name}: is damaged" in lines[0]


# Bad input


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: dict[str, Path], text_file: Path) -> Path:
    return write_recipe(tmp_path, tiny_folder["llama"], text_file.name)


def refused(ended: Ended, *parts: str) -> None:
    assert ended.code == 2, ended
    assert ended.out == "" and "Traceback" not in ended.err
    assert all(part in ended.err for part in parts), ended


REFUSED = [
    ("data.context=300", ("data.context", "300", "256")),
    ("data.train=[{source: text.jsonl, text: body}]", ("text.jsonl", "body", "text")),
    ("data.train=[{source: empty.jsonl}]", ("empty.jsonl",)),
    ("data.train=[{source: absent.jsonl}]", ("absent.jsonl",)),
    ("data.train=[{source: broken.jsonl}]", ("broken.jsonl", "2")),
    ("data.train=[{source: short.jsonl}]", ("64",)),
    (f"data.train=[{{source: text.jsonl, sha256: {'ab' * 32}}}]", ("abab", "text.jsonl")),
    ("model={base: bert, architecture: bert}", ("bert", "causal")),
    ("model.base=nobody/absent-model", ("nobody/absent-model", "pypi:")),
    ("precisions=[fp32]", ("phone-arm64 ships int4", "must have been measured")),
]


@pytest.mark.parametrize(("change", "parts"), REFUSED, ids=[change[:24] for change, _ in REFUSED])
def test_what_cannot_work_is_refused_and_nothing_is_left(
    edgedisp: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch, change: str, parts: tuple[str, ...]
) -> None:
    from transformers import BertConfig, BertModel

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    folder = recipe.parent
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (folder / "short.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    if "bert" in change:
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertModel(BertConfig(vocab_size=64, intermediate_size=16, **sizes)).save_pretrained(folder / "bert")
    refused(edgedisp("build", recipe, "--out", folder / "run", "--set", change), *parts)
    assert not (folder / "run").exists()


def test_an_output_folder_of_another_recipe_and_wrong_usage_are_refused(
    built: Built, edgedisp: Command
) -> None:
    ended = edgedisp("build", built.recipe, "--out", built.run, "--set", "train.lr=2e-3")
    refused(ended, "belongs to another recipe", "train.lr")
    for words in (("bild",), ("build",), ("build", "wikipedia", "--oot", "x"), ("build", "wikipedai")):
        assert edgedisp(*words).code == 2


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_ends_with_1_and_the_next_run_continues(
    edgedisp: Command, recipe: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3000k", "tmpfs", small], check=False)
    if mounted.returncode != 0:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        ended = edgedisp("build", recipe, "--out", small / "run")
        assert ended.code == 1, ended
        assert "the disk is full" in ended.err and "Traceback" not in ended.err
        subprocess.run(["mount", "-o", "remount,size=200m", small], check=True)
        again = edgedisp("build", recipe, "--out", small / "run")
        assert again.code == 0 and "kept" in again.err, again
    finally:
        subprocess.run(["umount", "-l", small], check=False)


FAR = """
task: far_away
dataset_path: no-such/set
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
"""


def test_a_task_whose_data_cannot_be_had_is_named_and_the_rest_goes_on(
    built: Built, tmp_path: Path, edgedisp: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    recipe, run = copy_of(built, tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "far.yaml").write_text(FAR)
    words = ["build", recipe, "--out", run, "--set", "evaluate.tasks_path=tasks"]
    words += ["--set", "evaluate.tasks=[heldout_perplexity, far_away]"]
    ended = edgedisp(*words)
    assert ended.code == 1, ended
    assert "far_away could not be scored: far_away cannot be loaded" in ended.err
    assert "Not scored: far_away" in (run / "report.md").read_text()
    assert "perplexity" in ended.out and f"report: {run / 'report.html'}" in ended.out
    again = edgedisp(*words)
    assert again.code == 1 and again.stages == {"items"}  # tried again; as nothing new came, all else is kept
    alone = edgedisp(*words[:-1], "evaluate.tasks=[far_away]")
    assert alone.code == 2 and "far_away cannot be loaded" in alone.err
