"""Local tasks of lm-evaluation-harness over a JSONL file: choice, rolling text, LAMBADA, generated text."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

QUESTIONS = [
    {"question": "which is a fruit?", "choices": ["apple", "brick", "chair of wood"], "gold": 0},
    {"question": "which can fly?", "choices": ["stone", "a swallow", "fish"], "gold": 1},
    {"question": "which is cold?", "choices": ["fire", "sun", "ice"], "gold": 2},
    {"question": "which is big?", "choices": ["whale", "ant", "bee"], "gold": 0},
    {"question": "what is wet?", "choices": ["sand", "rain", "dust"], "gold": 1},
]
DATA = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
YAML = {
    "choice": "task: toy_choice\n" + DATA + """output_type: multiple_choice
doc_to_text: "q: {{{{question}}}}\\na:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
""",
    "rolling": "task: toy_rolling\n" + DATA + """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question * 9}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
""",
    "lambada": "task: toy_lambada\n" + DATA + """output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
""",
    "generate": "task: toy_generate\n" + DATA + """output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
""",
}  # fmt: skip


def choice_yaml(name: str, data: Path | str, whole_task: bool = False) -> str:
    """The multiple choice under another name; `whole_task`: its only metric has no part per item."""
    text = YAML["choice"].format(data=data).replace("toy_choice", name)
    return text.split("  - {metric: acc,")[0] + "  - {metric: mcc}\n" if whole_task else text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the tasks, and a data set cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in QUESTIONS))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, text in YAML.items():
        (tasks / f"{name}.yaml").write_text(text.format(data=data))
    return tasks
