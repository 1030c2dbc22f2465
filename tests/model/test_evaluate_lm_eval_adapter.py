"""lm-evaluation-harness tasks over our models: local tasks, and lm-eval's own backend as the reference."""

from __future__ import annotations

import json
import math
import re
from collections import ChainMap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import datasets
import huggingface_hub
from graph_twins import make
from harness_tasks import QUESTIONS, choice_yaml, folder
from lm_eval.api.instance import Instance
from score_models import LETTERS, Letters, Speller

from edgedisp.core.errors import BadInput
from edgedisp.core.results import Score
from edgedisp.evaluate import lm_eval_adapter
from edgedisp.evaluate.comparison import Results, TaskResult
from edgedisp.evaluate.heldout_tasks import SuiteOptions
from edgedisp.evaluate.lm_eval_adapter import HarnessModel
from edgedisp.evaluate.loglikelihood import TextTokenizer
from edgedisp.evaluate.statistics import wilson
from edgedisp.evaluate.task_suite import TaskSuite, prepare
from edgedisp.models import TorchModel

__all__ = ["folder"]  # a fixture


def suite(names: list[str], folder: Path, limit: int = 100) -> TaskSuite:
    return prepare(Letters(), [], SuiteOptions(tuple(names), limit=limit, tasks_path=folder))


def run(model: Any, names: list[str], folder: Path, limit: int = 100) -> Results:
    return suite(names, folder, limit).run(model)


def value(result: TaskResult, metric: str | None = None) -> Any:
    score: Score = result.score.main if metric is None else result.score.metrics[metric]
    return score.estimate.value


def harness(model: Any) -> HarnessModel:
    return HarnessModel(model, TextTokenizer(Letters()))


def test_choices_are_scored_as_by_hand(folder: Path) -> None:
    model = Speller()
    result = run(model, ["toy_choice"], folder)["toy_choice"]
    right = normed = 0
    for row, item in zip(QUESTIONS, result.items, strict=True):
        expected = [model.logprob(f"q: {row['question']}\na:", " " + choice) for choice in row["choices"]]
        assert item["logprobs"] == pytest.approx(expected, abs=1e-5)
        by_length = np.divide(expected, [len(choice) for choice in row["choices"]])
        assert item["acc"] == (int(np.argmax(expected)) == row["gold"])
        assert item["acc_norm"] == (int(np.argmax(by_length)) == row["gold"])
        right, normed = right + int(item["acc"]), normed + int(item["acc_norm"])
    assert (value(result), value(result, "acc_norm")) == (right / 5, normed / 5)
    main = result.score.main
    assert (main.metric, main.estimate.n, main.higher_is_better, main.is_share) == ("acc", 5, True, True)
    assert (main.estimate.low, main.estimate.high) == wilson(right, 5)
    golds = [" " + row["choices"][row["gold"]] for row in QUESTIONS]
    nlls = [-model.logprob(f"q: {row['question']}\na:", gold) for row, gold in zip(QUESTIONS, golds)]
    assert value(result, "gold_nll") == pytest.approx(np.mean(nlls), rel=1e-6)
    bits = sum(nlls) / sum(map(len, golds)) / math.log(2)
    assert value(result, "gold_bits_per_byte") == pytest.approx(bits, rel=1e-6)
    assert result.score.chance == pytest.approx(1 / 3)


def test_long_rolling_texts_are_predicted_once_and_empty_ones_left_out(folder: Path) -> None:
    rows = [*QUESTIONS, {"question": "", "choices": ["a", "b", "c"], "gold": 0}]
    (folder.parent / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    model = Speller(context=16)
    result = run(model, ["toy_rolling"], folder)["toy_rolling"]
    texts = [row["question"] * 9 for row in QUESTIONS]
    nll = -sum(model.logprob("", text) for text in texts)
    words = sum(len(text.split()) for text in texts)
    assert value(result, "word_perplexity") == pytest.approx(math.exp(nll / words), rel=1e-6)
    bits = nll / sum(map(len, texts)) / math.log(2)
    assert value(result, "bits_per_byte") == pytest.approx(bits, rel=1e-6)
    assert len(result.items) == len(QUESTIONS)


def test_aggregates_made_from_items_equal_lm_evals_own(folder: Path) -> None:
    from lm_eval.evaluator import evaluate

    names = ["toy_choice", "toy_rolling", "toy_lambada"]
    loaded = dict(ChainMap(*lm_eval_adapter.load(names, folder)[0].values()))
    ours = run(Speller(), names, folder)
    # LAMBADA's own list has the perplexity first; a mean over tasks takes its accuracy.
    assert [*ours["toy_lambada"].score.metrics] == ["acc", "perplexity"]
    with lm_eval_adapter.quiet():
        theirs: Any = evaluate(harness(Speller()), {"tasks": loaded, "groups": {}}, bootstrap_iters=0)
    for name in names:
        for metric, score in ours[name].score.metrics.items():
            estimate: Any = score.estimate
            assert estimate.low <= estimate.value <= estimate.high
            if not metric.startswith("gold_"):  # these are ours alone
                assert estimate.value == pytest.approx(theirs["results"][name][f"{metric},none"], rel=1e-9)


def generate(model: Speller, prompt: str, **options: Any) -> str:
    request = Instance("generate_until", {}, (prompt, options), 0, ("t", 0, 1))
    return harness(model).generate_until([request])[0]


def test_generated_text_ends_at_stop_strings_end_of_text_and_limits(folder: Path) -> None:
    model = Speller(context=200)
    model.say("?rain.")
    result = run(model, ["toy_generate"], folder)["toy_generate"]
    assert [item["exact_match"] for item in result.items] == [0, 0, 0, 0, 1]
    model.table[:] = 0
    cycle = "abcdefghijklmnopqrstuvwxyz"
    model.say(cycle)
    model.table[LETTERS.index("z"), LETTERS.index("a")] = 50.0
    whole = (cycle * 9)[1:]
    assert generate(model, "a", max_gen_toks=150) == whole[:150]
    assert generate(model, "a", max_new_tokens=1) == "b"
    assert generate(model, "a", max_gen_toks=150, until="zab") == whole[: whole.index("zab")]
    model.prompts.clear()
    assert generate(model, "a", max_gen_toks=150, until=["yz", "nothing"]) == whole[: whole.index("yz")]
    assert len(model.prompts) == 1
    model.say("c\x00")
    assert generate(model, "a") == "bc"
    # A long prompt is cut on the left and keeps half of the context.
    model = Speller(context=32)
    prompt = "the quick brown fox jumps over the lazy dog"
    for text, most in ((prompt, 8), (prompt, 256), ("fox", 256)):
        generate(model, text, max_gen_toks=most)
    assert [Letters().decode(ids) for ids in model.prompts] == [prompt[-24:], prompt[-16:], "fox"]


def test_long_texts_read_in_other_contexts_are_not_the_same_items(folder: Path) -> None:
    names = ["toy_rolling", "toy_choice"]
    wide, narrow = (run(Speller(context=context), names, folder) for context in (64, 16))
    for name in names:  # all choices are longer than 16
        hashes = [{item["asked"] for item in results[name].items} for results in (wide, narrow)]
        assert not hashes[0] & hashes[1]
    again = run(Speller(context=48), ["toy_choice"], folder)["toy_choice"]
    assert again.score.items_sha256 == wide["toy_choice"].score.items_sha256  # none was cut
    cut = narrow["toy_choice"]
    assert cut.score.truncated == sum(len(row["choices"]) for row in QUESTIONS)
    expected = Speller(context=16).logprob("q: which is a fruit?\na:", " apple")
    assert cut.items[0]["logprobs"][0] == pytest.approx(expected, abs=1e-5)


def test_tasks_without_data_that_sample_or_have_no_metric_of_items_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (folder / "far.yaml").write_text(choice_yaml("toy_far", "x").replace("json", "no-such/set"))
    message = r"toy_far cannot be loaded: ConnectionError.*no-such/set.*heldout_.*tasks_path"
    loaded, missing = lm_eval_adapter.load(["toy_far", "toy_choice"], folder)
    assert [*loaded] == ["toy_choice"] and [*missing] == ["toy_far"]
    assert re.search(message, missing["toy_far"])
    with pytest.raises(BadInput, match=message):  # there is nothing else to score
        run(Speller(), ["toy_far"], folder)
    (folder / "gone.yaml").write_text(choice_yaml("toy_gone", "gone.jsonl"))
    sampled = (folder / "generate.yaml").read_text().replace("do_sample: false", "do_sample: true")
    (folder / "sampled.yaml").write_text(sampled.replace("toy_generate", "sampled"))
    (folder / "mcc.yaml").write_text(
        choice_yaml("toy_mcc", folder.parent / "questions.jsonl", whole_task=True)
    )
    for name, message in (
        ("toy_gone", r"toy_gone cannot be loaded: FileNotFoundError.*gone\.jsonl"),
        ("sampled", r"sampled asks for sampled text .*do_sample: false"),
        ("toy_mcc", r"toy_mcc has no metric that is made of its items \(mcc\).*commands\.lm_eval"),
    ):
        with pytest.raises(BadInput, match=message):
            lm_eval_adapter.load([name], folder)


TASK = "include: choice.yaml\ntask: toy_code\n"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"code.yaml": TASK + "process_docs: !function run.all"}, r"code\.yaml: has `!function run\.all`"),
        ({"code.yaml": "%TAG !x! !func\n---\n" + TASK + "filter_list: [!x!tion run.all]"}, "!function run"),
        (
            {
                "code.yaml": "include: [part]\ntask: toy_code",
                "part": TASK + "process_docs: !function run.all",
            },
            "part:",
        ),
        ({"code.yaml": TASK + "metric_list: [{metric: FOLDER/run, aggregation: mean}]"}, "metric: /"),
        ({"code.yaml": TASK + "doc_to_text: '{{cycler.__init__.__globals__.os.mkdir(\"RAN\")}}'"}, "unsafe"),
        ({"code.yaml": TASK + "a: [!function"}, "is no task of lm-eval: while parsing"),
    ],
)
def test_code_in_a_folder_of_tasks_runs_only_where_it_is_trusted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], reason: str
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder / "run").mkdir()
    for path in (folder / "run.py", folder / "run" / "run.py"):
        path.write_text("import os\nos.mkdir('RAN')\nall = lambda documents: documents")
    for name, text in files.items():
        (folder / name).write_text(text.replace("FOLDER", str(folder)))
    with pytest.raises(BadInput, match=reason):
        suite(["toy_code"], folder)
    assert not Path("RAN").exists()
    if "process_docs" in files["code.yaml"]:
        prepare(Letters(), [], SuiteOptions(("toy_code",), tasks_path=folder, trust_task_code=True))
        assert Path("RAN").is_dir()


def test_a_group_of_tasks_scored_alike_is_one_result_over_their_items(folder: Path) -> None:
    (folder / "other.yaml").write_text(choice_yaml("toy_other", folder.parent / "others.jsonl"))
    rows = [{**row, "question": row["question"][::-1]} for row in QUESTIONS[:3]]
    (folder.parent / "others.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "group.yaml").write_text("group: toy_both\ntask: [toy_choice, toy_other]\n")
    (folder / "mixed.yaml").write_text("group: toy_mixed\ntask: [toy_choice, toy_lambada]\n")
    assert sorted(lm_eval_adapter.load(["toy_mixed"], folder)[0]) == ["toy_choice", "toy_lambada"]
    model = Speller()
    pooled = run(model, ["toy_both"], folder)["toy_both"]
    parts = run(model, ["toy_choice", "toy_other"], folder)
    mean = (5 * value(parts["toy_choice"]) + 3 * value(parts["toy_other"])) / 8
    assert value(pooled) == pytest.approx(mean) and pooled.score.chance == pytest.approx(1 / 3)
    assert [item["id"] for item in pooled.items[4:6]] == ["toy_choice#4", "toy_other#0"]
    halved = run(model, ["toy_both"], folder, limit=4)["toy_both"]
    names = [f"toy_{name}#{number}" for name in ("choice", "other") for number in (0, 1)]
    assert [item["id"] for item in halved.items] == names


@pytest.mark.parametrize(("bos", "lead"), [("<end>", None), ("<begin>", None), ("<begin>", 257)])
def test_scores_and_text_equal_those_of_lm_evals_backend(bos: str, lead: int | None, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "<begin>"]
    bare = Tokenizer(models.BPE(vocab={letter: k for k, letter in enumerate(letters)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    if lead is not None:  # a tokenizer like Gemma's or Llama 3's
        bare.post_processor = processors.TemplateProcessing("<begin> $A", None, [("<begin>", lead)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token="<end>", pad_token="<end>", bos_token=bos
    )
    llama = make(tmp_path, "llama", vocab_size=len(letters), max_position_embeddings=64)
    model = TorchModel(llama, threads=1)
    ours = HarnessModel(model, TextTokenizer(tokenizer))
    assert ours.bos == ([] if lead is None else [lead])
    theirs = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=3, device="cpu", max_length=64)
    texts = ["the tide was out and the boats lay on their sides", "a bell rang twice", "snow fell all day"]

    def ask(kind: str, *arguments: Any) -> list[Instance]:
        return [Instance(kind, {}, args, 0, ("t", 0, 1)) for args in arguments]

    pairs = ask("loglikelihood", *[(text[:cut], text[cut : cut + 9]) for text in texts for cut in (0, 5, 13)])
    rolling = ask("loglikelihood_rolling", *[(text * 4,) for text in texts])
    # A prompt that is cut keeps its lead here, not there.
    options = {"until": ["e"], "max_gen_toks": 20 if lead is None else 13, "do_sample": False}
    prompts = ask("generate_until", *[(text, dict(options)) for text in texts])
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    results = ours.loglikelihood(pairs)
    assert [value for value, _ in results] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in results] == [greedy for _, greedy in expected]
    if lead is None:  # theirs forgets the lead from the second window on
        assert ours.loglikelihood_rolling(rolling) == pytest.approx(
            theirs.loglikelihood_rolling(rolling, disable_tqdm=True), abs=2e-3
        )
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)
