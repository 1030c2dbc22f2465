"""Items scored on a device: the draw, the answers, and their report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from shared_store import SharedStore
from tiny_bundle import tiny_bundles, write_sentences

from edgedisp.bench.devices import BenchOptions
from edgedisp.commands.devices import time_bundles
from edgedisp.core.files import to_json
from edgedisp.core.progress import silent
from edgedisp.core.results import DeviceResult
from edgedisp.evaluate import device_sample, statistics
from edgedisp.graph.runtime_layouts import for_device
from edgedisp.graph.session import scored_model
from edgedisp.pipeline.device_scores import DeviceQuestions, DeviceTasks
from edgedisp.report.devices import device_sections, devices_text

ITEMS = 20


@pytest.fixture(scope="module")
def bundles(store: SharedStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`fp32` with all logits, and `packed`, the same with the last token's alone."""
    fp32 = tiny_bundles(store)["fp32"]
    packed = tmp_path_factory.mktemp("packed") / "packed"
    packed.mkdir()
    for_device(fp32, packed, threads=1)
    return {"fp32": fp32, "packed": packed}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Scores go to a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("EDGEDISP_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tasks(cache: Path) -> DeviceTasks:
    return DeviceTasks(("heldout",), items=ITEMS, limit=40, text=write_sentences(cache / "text.jsonl"))


def test_the_draw_is_a_permutation_and_a_smaller_draw_its_start(
    tasks: DeviceTasks, bundles: dict[str, Path], cache: Path
) -> None:
    questions = DeviceQuestions(tasks, bundles, cache)
    suite, sample = questions.suites["fp32"], questions.samples["fp32"]
    cloze = suite.questions["heldout_cloze"]
    key = int.from_bytes(hashlib.sha256(b"heldout_cloze").digest()[:8], "big")
    permutation = np.random.default_rng([0, key]).permutation(len(cloze))[:ITEMS]
    ids = [cloze[index].id for index in permutation]
    assert [item.id for item in sample.items["heldout_cloze"]] == ids
    fewer = device_sample.draw(suite, scored_model(bundles["fp32"], 1), 7, seed=0)
    assert [item.id for item in fewer.items["heldout_cloze"]] == ids[:7]
    assert [item.task for item in sample.in_turn()[:4]] == [*suite.questions, next(iter(suite.questions))]


def test_a_device_in_fp32_gives_the_same_scores(tasks: DeviceTasks, bundles: dict[str, Path]) -> None:
    sizes = BenchOptions(prompt=4, generate=4, repetitions=1, threads=1)
    timed = time_bundles([*bundles.values()], ["local"], sizes, silent, tasks)
    (device,) = timed["devices"]
    assert not device.answers and len(device.rows) == len(bundles)
    records = {(record["label"], record["task"]): record for record in device.scores}
    assert len(records) == 3 * len(bundles)
    for record in records.values():
        assert record["answered"] == record["drawn"] == min(ITEMS, record["of"])
        assert record["logprob"]["mean_per_token"] < 1e-5
        assert record["logprob"]["max"] < 5e-4  # in float32, of sums up to 1,200
        assert record["agreement"] is None or record["agreement"]["share"] == 1
        assert record["device"]["value"] == pytest.approx(record["here"]["value"], rel=1e-5)
        assert record["difference"]["estimate"]["low"] <= 0 <= record["difference"]["estimate"]["high"]
    for task in ("heldout_cloze", "heldout_continuation"):
        fp32, packed = records["fp32", task], records["packed", task]
        assert fp32["full"]["value"] == pytest.approx(packed["full"]["value"], rel=1e-4)
    json.dumps(to_json(timed), allow_nan=False)


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
def test_what_cannot_be_scored_is_an_error(bundles: dict[str, Path], edgedisp, words, message) -> None:  # type: ignore
    result = edgedisp("bench", bundles["fp32"], *words)
    assert result.code == 2 and message in result.err, result


def test_the_table_shows_scores_verdict_and_missing_items() -> None:
    local, remote = (
        [{"id": str(i), "document": str(i), "accuracy": int(i < right)} for i in range(100)]
        for right in (60, 40)
    )
    record = {
        "label": "a/int4", "task": "cloze", "metric": "accuracy", "higher_is_better": True, "drawn": 120,
        "answered": 100, "of": 500, "truncated": 2, "full": {"value": 0.58, "low": 0.5, "high": 0.6},
        "here": {"value": 0.6}, "device": {"value": 0.4, "low": 0.31, "high": 0.5},
        "difference": to_json(statistics.difference([(local, remote)], statistics.ACCURACY)),
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
