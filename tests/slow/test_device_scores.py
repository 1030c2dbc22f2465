"""Items scored on a device, through the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from shared_store import SharedStore
from tiny_bundle import tiny_bundles, write_sentences

from edgedisp.bench.devices import BenchOptions, DeviceTasks
from edgedisp.commands.devices import time_bundles
from edgedisp.core.files import to_json
from edgedisp.core.progress import silent
from edgedisp.graph.runtime_layouts import for_device

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
    return DeviceTasks(("heldout",), items=ITEMS, text=write_sentences(cache / "text.jsonl"))


def test_a_device_in_fp32_gives_the_same_scores(tasks: DeviceTasks, bundles: dict[str, Path]) -> None:
    options = BenchOptions(prompt=4, generate=4, repetitions=1, threads=1, tasks=tasks)
    timed = time_bundles([*bundles.values()], ["local"], options, silent)
    (device,) = timed["devices"]
    assert not device.answers and len(device.rows) == len(bundles)
    assert len(device.scores) == 3 * len(bundles)
    for record in device.scores:
        assert record["answered"] == record["drawn"] <= ITEMS
        assert record["logprob"]["max"] < 5e-4  # in float32, of sums up to 1,200
        assert record["agreement"] is None or record["agreement"]["share"] == 1
        assert record["device"]["value"] == pytest.approx(record["here"]["value"], rel=1e-5)
        assert record["difference"]["estimate"]["low"] <= 0 <= record["difference"]["estimate"]["high"]
    json.dumps(to_json(timed), allow_nan=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--score", "heldout", "--items", "5"], "Invalid value for '--items'"),
        (["--tasks-path", "."], "--score: names no task"),
        (["--score", "heldout"], "the bundle lies in no run; name documents with --text"),
        (["--score", ","], "names no task"),
    ],
)
def test_what_cannot_be_scored_is_an_error(bundles: dict[str, Path], edgedisp, words, message) -> None:  # type: ignore
    result = edgedisp("bench", bundles["fp32"], *words)
    assert result.code == 2 and message in result.err, result
