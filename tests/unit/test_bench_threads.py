"""The sweep over thread counts, and writing the best one into a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import RUNNER, tiny_bundles

from edgedisp.bench.devices import Wanted
from edgedisp.bench.local import Local
from edgedisp.bench.sweep import sweep, thread_counts
from edgedisp.bench.timing import Timed
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import silent
from edgedisp.core.stage_folder import MANIFEST, check_files, list_files, write_json


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_bundles(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(
    ("cores", "cpus", "counts"),
    [
        (1, 1, [1]),
        (1, 2, [1, 2]),
        (2, 2, [1, 2]),
        (4, 8, [1, 2, 3, 4, 8]),
        (8, 8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (64, 128, [1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128]),
        (20, 20, [1, 2, 3, 4, 5, 6, 7, 8, 16, 20]),
    ],
)
def test_every_count_up_to_eight_is_tried_then_doublings(cores: int, cpus: int, counts: list[int]) -> None:
    assert thread_counts(cores, cpus) == counts


class Four(Local):
    """This machine, taken for one of four cores without a quota."""

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "physical_cores": 2, "logical_cpus": 4, "cpu_quota": 3.5}


def wanted(**changes: Any) -> Wanted:
    options: dict[str, Any] = {"runner": RUNNER, "cache": Path("unused"), "ids": lambda _: []}
    return Wanted(**{**options, "prompt": 4, "generate": 4, "repetitions": 5, **changes})


def test_the_best_count_has_the_highest_median_and_the_turns_are_shared(bundles: dict[str, Path]) -> None:
    found = sweep({"a": bundles["fp32"]}, Four(RUNNER), wanted(), silent)["a"]
    assert [row["threads"] for row in found["rows"]] == [1, 2, 3]
    speeds = {row["threads"]: row["decode_tokens_per_s"] for row in found["rows"]}
    assert speeds[found["best"]] == max(speeds.values())
    assert all(row["low"] <= row["decode_tokens_per_s"] <= row["high"] for row in found["rows"])


def test_what_is_timed_after_a_sweep_runs_on_the_best_count(bundles: dict[str, Path]) -> None:
    asked = wanted(sweep=True, repetitions=1)
    timed = Timed(Four(RUNNER), {"a": bundles["fp32"]}, asked).measure(silent)
    assert timed["rows"][0]["threads"] == timed["threads"]["a"]["best"]


def packed(source: Path, out: Path) -> Path:
    """A bundle with a manifest, as `edgedisp export` leaves one."""
    shutil.copytree(source, out)
    write_json(out / MANIFEST, {"format": 1, "threads": 99, "files": list_files(out)})
    return out


def test_the_best_count_is_written_and_the_manifest_stays_true(  # type: ignore[no-untyped-def]
    bundles: dict[str, Path], tmp_path: Path, edgedisp
) -> None:
    bundle = packed(bundles["int4"], tmp_path / "bundle")
    words = ["--threads", "sweep", "--write-threads", "--prompt", "4", "--generate", "4", "--pause", "0"]
    ended = edgedisp("bench", bundle, *words, "--repetitions", "1", "--json")
    assert ended.code == 0, ended
    found = json.loads(ended.out)
    best = found["written"]["bundle"]
    assert best == found["devices"][0]["threads"]["bundle"]["best"]
    config = json.loads((bundle / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["intra_op_num_threads"] == best
    assert json.loads((bundle / MANIFEST).read_text())["threads"] == best
    assert check_files(bundle)


def test_a_packed_bundle_in_a_run_keeps_a_true_record_too(bundles: dict[str, Path], tmp_path: Path) -> None:
    from edgedisp.core.stage_folder import RECORD, read
    from edgedisp.single import write_threads

    bundle = packed(bundles["int4"], tmp_path / "bundle")
    record = {"key": {}, "results": {}, "files": list_files(bundle), "seconds": 1.0}
    write_json(bundle / RECORD, record)
    write_threads(bundle, 123)
    again = read(bundle)
    assert again is not None and again.files == list_files(bundle, without=(RECORD,))


def test_a_bundle_that_later_stages_read_is_not_changed(bundles: dict[str, Path], tmp_path: Path) -> None:
    from edgedisp.single import write_threads

    bundle = tmp_path / "stage"
    shutil.copytree(bundles["int4"], bundle)
    before = list_files(bundle)
    with pytest.raises(BadInput, match=r"needs a bundle for a device .*edgedisp export"):
        write_threads(bundle, 2)
    assert list_files(bundle) == before
