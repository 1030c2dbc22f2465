"""Items scored on a device: the draw, the answers, and their report."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sshd
from shared_store import SharedStore
from test_phone_page import WEB, chromium
from tiny_bundle import Bundles, tiny_bundles

from edgedisp import data
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.interleaved_timing import Worker
from edgedisp.bench.system import physical_cores
from edgedisp.commands.devices import time_bundles
from edgedisp.commands.export import export_bundle
from edgedisp.core.files import to_json
from edgedisp.core.progress import silent
from edgedisp.core.results import DeviceResult
from edgedisp.evaluate import device_sample, statistics
from edgedisp.evaluate.loglikelihood import loglikelihoods
from edgedisp.graph.runtime_layouts import for_device
from edgedisp.graph.session import scored_model
from edgedisp.pipeline.device_scores import DeviceQuestions, DeviceTasks
from edgedisp.report.devices import device_sections, devices_text

SMALL = BenchOptions(prompt=4, generate=4, repetitions=1, threads=1)
ITEMS, LIMIT = 20, 40
needs_sshd = pytest.mark.skipif(sshd.MISSING is not None, reason=str(sshd.MISSING))
needs_chromium = pytest.mark.skipif(
    chromium() is None or not (WEB / "vendor").is_dir(), reason="needs Chromium and the page's libraries"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents of short sentences, in words that the tiny tokenizer knows."""
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "mat", "and", "dog", "log"]
    rows = []
    for _ in range(40):
        sentences = [" ".join(rng.choice(words, rng.integers(5, 9))).capitalize() for _ in range(12)]
        rows.append(json.dumps({"text": ". ".join(sentences) + "."}))
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def bundles(store: SharedStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`fp32` with all logits, and `packed`, the same with the last token's alone."""
    fp32 = tiny_bundles(store)["fp32"]
    packed = tmp_path_factory.mktemp("packed") / "packed"
    packed.mkdir()
    for_device(fp32, packed, threads=1)
    return {"fp32": fp32, "packed": packed}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Scores go to a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr("edgedisp.commands.devices.cache_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="module")
def tasks(text: Path) -> DeviceTasks:
    return DeviceTasks(("heldout",), items=ITEMS, limit=LIMIT, text=text)


@pytest.fixture(scope="module")
def questions(tasks: DeviceTasks, bundles: Bundles, cache: Path) -> DeviceQuestions:
    return DeviceQuestions(tasks, bundles, cache)


def test_the_draw_is_a_permutation_and_a_smaller_draw_its_start(questions: DeviceQuestions) -> None:
    suite, sample = questions.suites["fp32"], questions.samples["fp32"]
    cloze = suite.questions["heldout_cloze"]
    key = int.from_bytes(hashlib.sha256(b"heldout_cloze").digest()[:8], "big")
    order = np.random.default_rng([0, key]).permutation(len(cloze))[:ITEMS]
    assert [item.id for item in sample.items["heldout_cloze"]] == [cloze[index].id for index in order]
    model = scored_model(questions.bundles["fp32"], 1)
    fewer = device_sample.draw(suite, model, 7, seed=0)
    assert [item.id for item in fewer.items["heldout_cloze"]] == [cloze[index].id for index in order[:7]]
    assert [item.task for item in sample.in_turn()[:4]] == [*suite.questions, next(iter(suite.questions))]


def test_a_device_in_fp32_gives_the_same_scores(tasks: DeviceTasks, bundles: Bundles) -> None:
    timed = time_bundles([*bundles.values()], ["local"], SMALL, silent, tasks)
    (device,) = timed["devices"]
    assert not device.answers and len(device.rows) == len(bundles)
    records = device.scores
    assert len(records) == 3 * len(bundles)
    for record in records:
        assert record["answered"] == record["drawn"] == min(ITEMS, record["of"])
        assert record["logprob"]["mean_per_token"] < 1e-5
        assert record["logprob"]["max"] < 5e-4  # in float32, of sums up to 1,200
        assert record["agreement"] is None or record["agreement"]["share"] == 1
        assert record["device"]["value"] == pytest.approx(record["here"]["value"], rel=1e-5)
        assert record["difference"]["estimate"]["low"] <= 0 <= record["difference"]["estimate"]["high"]
    by_name = {(record["label"], record["task"]): record for record in records}
    for task in ("heldout_cloze", "heldout_continuation"):
        fp32, packed = by_name["fp32", task], by_name["packed", task]
        assert fp32["full"]["value"] == pytest.approx(packed["full"]["value"], rel=1e-4)
    json.dumps(to_json(timed), allow_nan=False)


def test_other_answers_of_a_device_are_counted(questions: DeviceQuestions) -> None:
    """A device that gets three next sentences wrong, all other scores being this machine's."""
    model = scored_model(questions.bundles["fp32"], 1)
    sample = questions.samples["fp32"]
    answers: list[list[device_sample.Answer]] = []
    wrong: list[tuple[str, float]] = []
    for item in sample.in_turn():
        scores = [(score.sum_logprob, score.greedy) for score in loglikelihoods(model, item.requests)]
        if item.task == "heldout_continuation" and len(wrong) < 3:
            question = next(q for q in questions.suites["fp32"].questions[item.task] if q.id == item.id)
            by_byte = [total / size for (total, _), size in zip(scores, question.sizes)]
            worst = int(np.argmin(by_byte))
            scores[worst] = (0.0, True)
            wrong.append((item.id, by_byte[worst] * question.sizes[worst]))
        answers.append(scores)
    records = questions.score([{"fp32": answers}], physical_cores(), silent)[0]
    record = next(row for row in records if (row["label"], row["task"]) == ("fp32", "heldout_continuation"))
    agreement = record["agreement"]
    assert agreement["same"] == agreement["n"] - 3 and agreement["of"] == "choice"
    assert record["logprob"]["max"] == pytest.approx(-min(size for _, size in wrong), rel=1e-5)
    assert record["logprob"]["item"] in [item for item, _ in wrong]
    assert 0 < record["difference"]["estimate"]["p"] <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--score", "heldout", "--items", "5"], "--items 5: give 20 to 2000"),
        (["--score", "heldout", "--items", "50", "--limit", "30"], "less than the 50 --items"),
        (["--items", "50"], "--items: says what is scored; give --score"),
        (["--tasks-path", "."], "--tasks-path: says what is scored"),
        (["--score", "heldout"], "the bundle lies in no run; name documents with --text"),
        (["--score", ","], "names no task"),
    ],
)
def test_what_cannot_be_scored_is_an_error(bundles: Bundles, edgedisp, words, message) -> None:  # type: ignore
    result = edgedisp("bench", bundles["fp32"], *words)
    assert result.code == 2 and message in result.err, result


@needs_sshd
def test_over_ssh_scores_arrive_and_a_lost_connection_leaves_a_part(  # type: ignore[no-untyped-def]
    bundles: Bundles, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edgedisp
) -> None:
    ask, counts = Worker.ask, []
    with sshd.running(tmp_path / "s") as server:
        monkeypatch.setenv("EDGEDISP_SSH", server.command)
        words = ["--prompt", "4", "--generate", "4", "--repetitions", "1", "--threads", "1", "--pause", "0"]
        words += ["--device", server.device, "--remote-python", sys.executable, "--json"]
        words += ["--score", "heldout_cloze", "--text", str(text), "--items", "20", "--limit", "40"]
        page = tmp_path / "page.html"
        result = edgedisp("bench", bundles["fp32"], *words, "--html", page)
        assert result.code == 0, result
        (record,) = json.loads(result.out)["devices"][0]["scores"]
        assert record["answered"] == 20 and record["logprob"]["max"] < 1e-4
        assert record["agreement"]["share"] == 1 and "Scored on the device" in page.read_text()

        def cut(worker: Worker, command: dict[str, Any]) -> Any:
            counts.append("score" in command)
            if sum(counts) == 7:  # six items are scored
                server.break_connections()
            return ask(worker, command)

        monkeypatch.setattr(Worker, "ask", cut)
        result = edgedisp("bench", bundles["fp32"], *words)
    assert result.code == 1 and "What was measured until then is shown" in result.err
    (device,) = json.loads(result.out)["devices"]
    (record,) = device["scores"]
    assert device["lost"] and 6 <= record["answered"] < 20 and len(device["rows"]) == 1
    assert record["device"]["value"] == pytest.approx(record["here"]["value"])


@needs_chromium
def test_a_browser_gives_the_scores_of_this_machine(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    export_bundle(tiny_folder["llama"], "browser", tmp_path / "web", silent)
    assert not (tmp_path / "web" / "model.onnx").exists()
    text, documents = tmp_path / "text.jsonl", data.synthetic_documents(40, seed=5)
    text.write_text("\n".join(json.dumps({"text": document.text}) for document in documents))
    tasks = DeviceTasks(("heldout_cloze", "heldout_continuation"), items=20, limit=30, text=text)
    timed = time_bundles([tmp_path / "web"], ["browser"], SMALL, silent, tasks)
    for record in timed["devices"][0].scores:
        assert record["answered"] == 20 and record["agreement"]["share"] == 1
        assert record["logprob"]["max"] < 1e-3 and record["logprob"]["mean_per_token"] < 1e-5


def test_the_table_shows_scores_verdict_and_missing_items() -> None:
    local, remote = (
        [{"id": str(i), "document": str(i), "accuracy": int(i < right)} for i in range(100)]
        for right in (60, 40)
    )
    change = to_json(statistics.difference([(local, remote)], statistics.ACCURACY))
    record = {
        "label": "a/int4", "task": "cloze", "metric": "accuracy", "higher_is_better": True, "drawn": 120,
        "answered": 100, "of": 500, "truncated": 2, "full": {"value": 0.58, "low": 0.5, "high": 0.6},
        "here": {"value": 0.6}, "device": {"value": 0.4, "low": 0.31, "high": 0.5},
        "difference": change,
        "agreement": device_sample.agreement(local, remote, "accuracy"),
        "logprob": {"mean": 0.01, "max": 0.5}, "reason": None,
    }  # fmt: skip
    device = DeviceResult("ssh://pi", scores=[record])
    output = devices_text([device], 400)
    for text in (
        "100 of 500", "worse on the device (p = <0.001)", "80.0 [71.1, 86.7] %", "-20",
        "a/int4: cloze: 100 of 120 items answered", "2 items longer than the context",
    ):  # fmt: skip
        assert text in output
    assert [section.key for section in device_sections([device])] == ["device_scores", "device0"]
