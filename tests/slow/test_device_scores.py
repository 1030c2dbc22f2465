"""Items scored on a device: what is drawn, what comes back, and what is said of it."""

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
from tiny_bundle import tiny_bundles

from edgedisp import data
from edgedisp.bench.browser import BrowserPage
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
from edgedisp.graph.device_graph import for_device
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
        said = [" ".join(rng.choice(words, rng.integers(5, 9))).capitalize() for _ in range(12)]
        rows.append(json.dumps({"text": ". ".join(said) + "."}))
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def bundles(store: SharedStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`fp32` with all logits, and `packed`, the same with the last token's alone."""
    found = tiny_bundles(store)
    packed = tmp_path_factory.mktemp("packed") / "packed"
    packed.mkdir()
    for_device(found["fp32"], packed, threads=1)
    return {"fp32": found["fp32"], "packed": packed}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Scores go to a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr("edgedisp.commands.devices.cache_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="module")
def tasks(text: Path) -> DeviceTasks:
    return DeviceTasks(("heldout",), items=ITEMS, limit=LIMIT, text=text)


@pytest.fixture(scope="module")
def questions(tasks: DeviceTasks, bundles: dict[str, Path], cache: Path) -> DeviceQuestions:
    return DeviceQuestions(tasks, bundles, cache)


@pytest.fixture(scope="module")
def timed(tasks: DeviceTasks, bundles: dict[str, Path]) -> dict[str, Any]:
    return time_bundles([*bundles.values()], ["local"], SMALL, lambda *step: None, tasks)


def test_the_draw_is_a_permutation_by_seed_and_task_and_a_smaller_one_is_its_beginning(
    questions: DeviceQuestions,
) -> None:
    suite, sample = questions.suites["fp32"], questions.samples["fp32"]
    asked = suite.questions["heldout_cloze"]
    key = int.from_bytes(hashlib.sha256(b"heldout_cloze").digest()[:8], "big")
    places = np.random.default_rng([0, key]).permutation(len(asked))[:ITEMS]
    assert [item.id for item in sample.items["heldout_cloze"]] == [asked[place].id for place in places]
    model = scored_model(questions.bundles["fp32"], 1)
    fewer = device_sample.draw(suite, model, 7, seed=0)
    assert [item.id for item in fewer.items["heldout_cloze"]] == [asked[place].id for place in places[:7]]
    assert [item.task for item in sample.in_turn()[:4]] == [*suite.questions, next(iter(suite.questions))]


def test_a_device_in_fp32_gives_the_scores_of_this_machine(
    timed: dict[str, Any], bundles: dict[str, Path]
) -> None:
    (device,) = timed["devices"]
    assert not device.answers and len(device.rows) == len(bundles)
    records = device.scores
    assert len(records) == 3 * len(bundles)
    for record in records:
        assert record["answered"] == record["drawn"] == min(ITEMS, record["of"])
        if record["label"] != "int4":
            assert record["logprob"]["mean_per_token"] < 1e-5
            assert (
                record["logprob"]["max"] < 5e-4
            )  # in float32, of sums up to 1,200: this model knows nothing
            assert record["agreement"] is None or record["agreement"]["share"] == 1
            assert record["device"]["value"] == pytest.approx(record["here"]["value"], rel=1e-5)
            assert record["difference"]["estimate"]["low"] <= 0 <= record["difference"]["estimate"]["high"]
    by_name = {(one["label"], one["task"]): one for one in records}
    for task in ("heldout_cloze", "heldout_continuation"):
        fp32, packed = by_name["fp32", task], by_name["packed", task]
        assert fp32["full"]["value"] == pytest.approx(packed["full"]["value"], rel=1e-4)
    json.dumps(to_json(timed), allow_nan=False)


def test_what_a_device_answers_otherwise_is_found(questions: DeviceQuestions) -> None:
    """A device that gets three next sentences wrong, all other scores being this machine's."""
    model = scored_model(questions.bundles["fp32"], 1)
    sample = questions.samples["fp32"]
    answers: list[list[device_sample.Answer]] = []
    wrong: list[tuple[str, float]] = []
    for item in sample.in_turn():
        found = loglikelihoods(model, item.requests)
        given = [(one.sum_logprob, one.greedy) for one in found]
        if item.task == "heldout_continuation" and len(wrong) < 3:
            question = next(q for q in questions.suites["fp32"].questions[item.task] if q.id == item.id)
            by_byte = [total / size for (total, _), size in zip(given, question.sizes)]
            worst = int(np.argmin(by_byte))
            given[worst] = (0.0, True)
            wrong.append((item.id, by_byte[worst] * question.sizes[worst]))
        answers.append(given)
    told = questions.score([{"fp32": answers}], physical_cores(), lambda *step: None)[0]
    record = next(one for one in told if (one["label"], one["task"]) == ("fp32", "heldout_continuation"))
    assert record["agreement"]["same"] == record["agreement"]["n"] - 3
    assert record["agreement"]["of"] == "choice"
    assert record["logprob"]["max"] == pytest.approx(-min(size for _, size in wrong), rel=1e-5)
    assert record["logprob"]["item"] in [one for one, _ in wrong]
    assert 0 < record["difference"]["estimate"]["p"] <= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--score", "heldout", "--items", "5"], "--items 5: give 20 to 2000"),
        (["--score", "heldout", "--items", "50", "--limit", "30"], "less than the 50 --items"),
        (["--items", "50"], "--items: says what is scored; give --score"),
        (["--tasks-path", "."], "--tasks-path: says what is scored"),
        (["--score", "heldout"], "the bundle lies in no run; name documents with --text"),
        (["--score", ","], "names no task"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_timed(  # type: ignore[no-untyped-def]
    bundles: dict[str, Path], edgedisp, words: list[str], said: str
) -> None:
    ended = edgedisp("bench", bundles["fp32"], *words)
    assert ended.code == 2 and said in ended.err, ended


@needs_sshd
def test_over_ssh_scores_arrive_and_a_lost_connection_leaves_a_part(  # type: ignore[no-untyped-def]
    bundles: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edgedisp
) -> None:
    real, scored = Worker.ask, []

    with sshd.running(tmp_path / "s") as server:
        monkeypatch.setenv("EDGEDISP_SSH", server.command)
        words = ["--prompt", "4", "--generate", "4", "--repetitions", "1", "--threads", "1", "--pause", "0"]
        words += ["--device", server.device, "--remote-python", sys.executable, "--json"]
        words += ["--score", "heldout_cloze", "--text", str(text), "--items", "20", "--limit", "40"]
        page = tmp_path / "page.html"
        ended = edgedisp("bench", bundles["fp32"], *words, "--html", page)
        assert ended.code == 0, ended
        (record,) = json.loads(ended.out)["devices"][0]["scores"]
        assert record["answered"] == 20 and record["logprob"]["max"] < 1e-4
        assert record["agreement"]["share"] == 1 and "Scored on the device" in page.read_text()

        def cut(worker: Worker, command: dict[str, Any]) -> Any:
            answer = real(worker, command)
            if "score" in command:
                scored.append(answer)
            if len(scored) == 6:
                server.break_connections()
            return answer

        monkeypatch.setattr(Worker, "ask", cut)
        ended = edgedisp("bench", bundles["fp32"], *words)
    assert ended.code == 1 and "What was measured until then is shown" in ended.err
    (device,) = json.loads(ended.out)["devices"]
    (record,) = device["scores"]
    assert device["lost"] and 6 <= record["answered"] < 20 and len(device["rows"]) == 1
    assert record["device"]["value"] == pytest.approx(record["here"]["value"])


@needs_chromium
def test_the_page_gives_the_scores_of_this_machine(
    questions: DeviceQuestions, bundles: dict[str, Path]
) -> None:
    items = questions.requests["fp32"][:24]
    notes: list[str] = []
    options = BenchOptions(prompt=4, generate=4, repetitions=1, requests={"fp32": items})
    page = BrowserPage({"fp32": bundles["fp32"]}, options)
    found = page.measure(lambda done, total, note: notes.append(note))
    assert len(found.rows) == 1 and any("of 24 items scored" in note for note in notes)
    model = scored_model(bundles["fp32"], 1)
    for item, answers in zip(items, found.answers["fp32"], strict=True):
        expected = loglikelihoods(model, [(tuple(a), tuple(b)) for a, b in item])
        for (total, greedy), one in zip(answers, expected, strict=True):
            assert total == pytest.approx(one.sum_logprob, abs=1e-4 * len(one.logprobs))
            assert greedy == one.greedy


@needs_chromium
def test_a_bundle_for_browsers_alone_is_scored_there_and_here(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    export_bundle(tiny_folder["llama"], "browser", tmp_path / "web", silent)
    assert not (tmp_path / "web" / "model.onnx").exists()
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": one.text}) for one in data.synthetic_documents(40, seed=5)))
    tasks = DeviceTasks(("heldout_cloze", "heldout_continuation"), items=20, limit=30, text=text)
    timed = time_bundles([tmp_path / "web"], ["browser"], SMALL, lambda *step: None, tasks)
    for record in timed["devices"][0].scores:
        assert record["answered"] == 20 and record["agreement"]["share"] == 1
        assert record["logprob"]["max"] < 1e-3 and record["logprob"]["mean_per_token"] < 1e-5


def test_the_table_tells_scores_verdict_and_what_is_missing() -> None:
    def items(right: int) -> list[dict[str, Any]]:
        return [{"id": str(i), "document": str(i), "accuracy": int(i < right)} for i in range(100)]

    here, there = items(60), items(40)
    change = to_json(statistics.difference([(here, there)], statistics.ACCURACY))
    record = {
        "label": "a/int4", "task": "cloze", "metric": "accuracy", "higher_is_better": True, "drawn": 120,
        "answered": 100, "of": 500, "truncated": 2, "full": {"value": 0.58, "low": 0.5, "high": 0.6},
        "here": {"value": 0.6}, "device": {"value": 0.4, "low": 0.31, "high": 0.5},
        "difference": change,
        "agreement": device_sample.agreement(here, there, "accuracy"), "logprob": {"mean": 0.01, "max": 0.5},
        "reason": None,
    }  # fmt: skip
    device = DeviceResult("ssh://pi", scores=[record])
    shown = devices_text([device], 400)
    assert "100 of 500" in shown and "worse on the device (p = <0.001)" in shown
    assert "80.0 [71.1, 86.7] %" in shown and "-20" in shown
    assert "a/int4: cloze: 100 of 120 items answered" in shown
    assert "2 items longer than the context" in shown
    assert [one.key for one in device_sections([device])] == ["device_scores", "device0"]
