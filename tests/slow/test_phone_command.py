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
from fake_page import RUN, figures, post
from tiny_bundle import Bundles

from edgedisp.evaluate.loglikelihood import loglikelihoods
from edgedisp.graph.session import scored_model
from edgedisp.pipeline import device_results

TOP = Path(__file__).resolve().parents[2]
SIZES = ["--prompt", "6", "--generate", "4", "--repetitions", "3"]
LOCAL = [*SIZES, "--host", "127.0.0.1"]

pytest.importorskip("segno", reason='needs the extra [phone]: pip install "edgedisp[phone]"')
pytestmark = pytest.mark.skipif(
    not (TOP / "export" / "web" / "vendor").is_dir(), reason="needs the page's libraries: make web"
)


class Running:
    """The program with its address."""

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
        out, _ = self.process.communicate(timeout=30)
        return self.process.returncode, out


@contextmanager
def running(tmp_path: Path, *words: str | Path) -> Iterator[Running]:
    log = tmp_path / "stderr.txt"
    command = [sys.executable, "-m", "edgedisp", "phone", *map(str, words), "--port", "0"]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        yield Running(process, log)
    finally:
        process.kill()
        process.wait()


def test_figures_are_printed_written_and_ctrl_c_ends_well(bundles: Bundles, tmp_path: Path) -> None:
    two, out = [bundles["fp32"], bundles["twin"]], tmp_path / "phone.json"
    with running(tmp_path, *two, *LOCAL, "--out", out) as program:
        assert program.post(figures(program.fetch("plan.json"), run="f" * 16)) == 204
        lost = figures(program.fetch("plan.json"), turns=1)  # of another phone, after its first turn
        assert program.post(lost) == 204
        assert program.post({"kind": "figures"}) == 400
        program.process.send_signal(signal.SIGINT)
        code, output = program.result()
    assert code == 0, program.log.read_text()
    assert ("decode t/s" in output and "(partial)" in output) or "follows is partial" in output
    first, second = json.loads(out.read_text())["devices"]
    assert [row["label"] for row in first["rows"]] == ["fp32", "twin"]
    assert first["lost"] is None and "not sent the rest" in second["lost"]
    log = program.log.read_text()
    assert log.count("refused what 127.0.0.1 sent") == 1 and "\u2580" in log  # and a QR code


def test_once_ends_by_itself_with_one_line_of_json_and_the_run_keeps_the_result(
    bundles: Bundles, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "q-01234567"
    shutil.copytree(bundles["fp32"], run / "baseline" / "fp32")
    (run / "run.json").write_text("{}")
    words = [run / "baseline" / "fp32", *LOCAL, "--once", "--json"]
    with running(tmp_path, *words) as program:
        assert program.post(figures(program.fetch("plan.json"))) == 204
        code, output = program.result()
    assert code == 0
    assert json.loads(output)["devices"][0]["rows"][0]["label"] == "fp32"
    (result,) = device_results.load(run)[0]
    assert result.rows[0].label == "baseline/fp32" and result.device.startswith("phone")
    assert "the report will show it once `edgedisp build` has ended" in program.log.read_text()


def test_what_a_phone_scores_is_compared_with_this_machine(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEDISP_CACHE", str(tmp_path / "cache"))
    sentence = "The cat sat on the mat and the dog sat on the log and the cat sat on the dog. "
    rows = [json.dumps({"text": sentence * 3 + f"And the dog {'and the dog ' * n}sat."}) for n in range(20)]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(rows))
    words = [*LOCAL, "--score", "heldout_cloze", "--text", text, "--items", "20", "--once", "--json"]
    with running(tmp_path, bundles["fp32"], *words) as program:
        items = program.fetch("requests/0.json")
        assert program.post(figures(program.fetch("plan.json"))) == 204
        requests = [(a, b) for item in items for a, b in item]
        scores = loglikelihoods(scored_model(bundles["fp32"], 1), requests)
        answers = [[[score.sum_logprob, score.greedy]] for score in scores]
        for first in (0, 10):
            piece = {"kind": "scores", "run": RUN, "label": "fp32", "first": first}
            assert program.post({**piece, "answers": answers[first : first + 10]}) == 204
        code, out = program.result()
    (device,) = json.loads(out)["devices"]
    assert code == 0 and not device["answers"] and device["lost"] is None
    (record,) = device["scores"]
    assert record["answered"] == len(items) == 20 and record["agreement"]["share"] == 1
    assert record["logprob"]["max"] < 1e-4
    assert json.loads(out)["scored"]["tasks"] == ["heldout_cloze"]


def test_ctrl_c_before_anything_came_is_an_interruption(bundles: Bundles, tmp_path: Path) -> None:
    with running(tmp_path, bundles["fp32"], *LOCAL) as program:
        program.process.send_signal(signal.SIGINT)
        assert program.result() == (130, "")
    assert "interrupted" in program.log.read_text()


def test_bad_input_is_an_error_before_anything_is_served(  # type: ignore[no-untyped-def]
    edgedisp, bundles: Bundles, tmp_path: Path
) -> None:
    for words, message in (
        ([tmp_path / "none"], "no such folder"),
        ([bundles["fp32"], "--prompt", "200", "--generate", "100"], "its context is 256"),
        ([bundles["fp32"], *SIZES, "--out", tmp_path / "none" / "x.json"], "--out"),
    ):
        result = edgedisp("phone", *words)
        assert result.code == 2 and message in result.err
