"""The real command with an adapter, from training to the report: one build of a tiny QLoRA recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tiny_build import write_documents

from edgedisp import models
from edgedisp.core.stage_folder import read

RECIPE = """\
name: tiny
model: {{base: {base}, architecture: llama}}
data: {{train: [{{source: text.jsonl}}], heldout: 20%, context: 32}}
train:
  {{tokens: 1k, lr: 1e-2, dispersion: {{weight: 0.1, tokens: 16}}, adapter: {{kind: qlora, rank: 4}}}}
precisions: [int4]
verify: {{tokens: 64, int4_top1: 0, int4_kl: 5}}
evaluate: {{tasks: [heldout_perplexity], limit: 2, perplexity_tokens: 200, bootstrap: 50}}
latency: {{prompt: 4, generate: 2, repetitions: 1, threads: 1}}
"""
ARMS = ("baseline", "dispersed")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_folder: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    write_documents(folder / "text.jsonl", 80)
    (folder / "tiny.yaml").write_text(RECIPE.format(base=tiny_folder["llama"]))
    command = [
        Path(sys.executable).parent / "edgedisp",
        "build",
        folder / "tiny.yaml",
        "--out",
        folder / "run",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    for noise in ("bitsandbytes", "gemm_4bit", "Warning", "warn("):
        assert noise not in ended.stderr + ended.stdout
    return folder


def test_both_arms_are_merged_into_one_kind_of_base_and_the_record_says_why(built: Path) -> None:
    records = [read(built / "run" / arm / "model") for arm in ARMS]
    audits = [record.results["merge_audit"] for record in records if record is not None]
    assert len(audits) == 2 and audits[0]["chosen"] == audits[1]["chosen"]
    assert audits[1]["why"] == "the audit of the arm baseline decides for every arm"
    for record, audit in zip(records, audits):
        assert [row["name"] for row in audit["rows"]] == [
            "no adapter", "no adapter, int4", "adapter on", "merged into the full base",
            "merged into the full base, bf16", "merged into the full base, int4",
            "merged into the dequantized base", "merged into the dequantized base, int4",
        ]  # fmt: skip
        assert audit["gains"]["fp32"]["high"] < 0  # the training was not lost in the merge
        assert record is not None and record.results["log"][-1]["loss"] < record.results["log"][0]["loss"]
    assert "Merge audit" in (built / "run" / "report.md").read_text()


def test_the_adapter_folder_is_opened_by_peft_alone(built: Path) -> None:
    ids = torch.arange(3, 27)[None]
    for arm in ARMS:
        folder = built / "run" / arm / "adapter"
        with_adapter = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        merged = models.load(built / "run" / arm / "model")
        record = read(built / "run" / arm / "model")
        assert record is not None
        with torch.no_grad():
            on, off = with_adapter(input_ids=ids).logits, merged(input_ids=ids).logits
        if record.results["merge_audit"]["chosen"] == "full":
            torch.testing.assert_close(on, off, rtol=1e-4, atol=1e-4)
        else:
            assert (on - off).abs().max() > 1e-3
