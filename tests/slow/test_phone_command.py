"""`edgedisp phone` as a program: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from browsers import needs_web
from fake_page import figures, post
from tiny_bundle import Bundles, write_sentences

from edgedisp.evaluate.loglikelihood import loglikelihoods
from edgedisp.graph.session import scored_model
from edgedisp.pipeline import device_results

SIZES = ["--prompt", "6", "--generate", "4", "--repetitions", "3", "--host", "127.0.0.1"]
pytest.importorskip("segno", reason='needs the extra [phone]: pip install "edgedisp[phone]"')
pytestmark = needs_web


class Program:
    """The running command with its address and its log."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        while not (match := re.search(r"https?://\S+/", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        self.address = match.group()

    def fetch(self, name: str) -> Any:
        with urlopen(f"{self.address}{name}", timeout=60) as answer:
            return json.loads(answer.read())

    def post(self, content: object) -> int:
        return post(self.address, content)

    def result(self) -> tuple[int, str]:
        """Exit code and stdout."""
        stdout, _ = self.process.communicate(timeout=30)
        return self.process.returncode, stdout


@contextmanager
def running(tmp_path: Path, *words: str | Path) -> Iterator[Program]:
    log = tmp_path / "stderr.txt"
    command = [sys.executable, "-m", "edgedisp", "phone", *map(str, words), "--port", "0"]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        yield Program(process, log)
    finally:
        process.kill()
        process.wait()


def test_figures_are_printed_written_and_ctrl_c_ends_well(bundles: Bundles, tmp_path: Path) -> None:
    two, out = [bundles["fp32"], bundles["twin"]], tmp_path / "phone.json"
    with running(tmp_path, *two, *SIZES, "--out", out) as program:
        assert program.post(figures(program.fetch("plan.json"), run="f" * 16)) == 200
        lost = figures(program.fetch("plan.json"), turns=1)  # of another phone, after its first turn
        assert program.post(lost) == 200
        assert program.post({"run": "figures"}) == 400
        program.process.send_signal(signal.SIGINT)
        code, output = program.result()
    assert code == 0, program.log.read_text()
    assert ("decode t/s" in output and "(partial)" in output) or "follows is partial" in output
    first, second = json.loads(out.read_text())["devices"]
    assert [row["label"] for row in first["rows"]] == ["fp32", "twin"]
    assert first["lost"] is None and "not sent the rest" in second["lost"]
    log = program.log.read_text()
    assert log.count("refused what 127.0.0.1 sent") == 1 and "\u2580" in log  # and a QR code


def test_once_ends_with_one_line_of_json_scores_included_and_the_run_keeps_the_result(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEDISP_CACHE", str(tmp_path / "cache"))
    run, text = tmp_path / "runs" / "q-01234567", write_sentences(tmp_path / "text.jsonl")
    bundle = Path(shutil.copytree(bundles["fp32"], run / "baseline" / "fp32"))
    (run / "run.json").write_text("{}")
    words = [*SIZES, "--score", "heldout_cloze", "--text", text, "--items", "20", "--once", "--json"]
    with running(tmp_path, bundle, *words) as program:
        items = program.fetch("requests/0.json")
        plan = program.fetch("plan.json")
        requests = [(context, continuation) for item in items for context, continuation in item]
        scores = loglikelihoods(scored_model(bundle, 1), requests)
        answers = [[[score.sum_logprob, score.greedy]] for score in scores]
        for count in (10, 20):
            sent = figures(plan, answers={"fp32": answers[:count]}, complete=count == 20)
            assert program.post(sent) == 200
        code, output = program.result()
    assert code == 0 and json.loads(output)["scored"]["tasks"] == ["heldout_cloze"]
    (device,) = json.loads(output)["devices"]
    assert device["rows"][0]["label"] == "fp32" and not device["answers"] and device["lost"] is None
    (record,) = device["scores"]  # compared with this machine
    assert record["answered"] == len(items) == 20 and record["agreement"]["share"] == 1
    assert record["logprob"]["max"] < 1e-4
    (result,) = device_results.load(run)[0]
    assert result.rows[0].label == "baseline/fp32" and result.device.startswith("phone")
    assert "the report will show it once `edgedisp build` has ended" in program.log.read_text()


def test_ctrl_c_before_anything_came_is_an_interruption(bundles: Bundles, tmp_path: Path) -> None:
    with running(tmp_path, bundles["fp32"], *SIZES) as program:
        program.process.send_signal(signal.SIGINT)
        assert program.result() == (130, "")
    assert "interrupted" in program.log.read_text()
