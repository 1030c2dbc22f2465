"""lm-evaluation-harness tasks over our models: local tasks, and lm-eval's own backend as the reference."""

from __future__ import annotations

import json
import logging
import math
import random
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("lm_eval")

import datasets
import huggingface_hub
import lm_eval.api.task
from lm_eval.api.instance import Instance

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.evaluate import catalog, tasks
from edgedisp.evaluate.harness import HarnessModel
from edgedisp.evaluate.kept import Kept
from edgedisp.evaluate.result import compare_task
from edgedisp.models import bos_id

LETTERS = "\x00\n abcdefghijklmnopqrstuvwxyz?:."


class Letters:
    """One token a letter; id 0 ends a document."""

    eos_token_id = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [LETTERS.index(letter) for letter in text.lower()]}

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(LETTERS[number] for number in ids)


def encode(text: str) -> list[int]:
    return Letters()(text)["input_ids"]


def decode(ids: list[int]) -> str:
    return Letters().decode(ids)


class Table:
    """A bigram model over letters; its greedy text follows the largest logit."""

    vocab_size = len(LETTERS)
    tree_nodes, packs = 0, True

    def __init__(self, seed: int = 0, context: int = 64) -> None:
        self.logits = (
            np.random.default_rng(seed).normal(0, 2, (len(LETTERS), len(LETTERS))).astype(np.float32)
        )
        self.context = context
        self.prompts: list[list[int]] = []

    def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.logits[ids]

    def greedy(self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        self.prompts.append(ids)
        new: list[int] = []
        while len(new) < max_new_tokens and not (new and new[-1] in stop_ids):
            new.append(int(self.logits[(ids + new)[-1]].argmax()))
        return new

    def say(self, text: str) -> None:
        """Make `text` what follows its first letter (each letter in it may occur once)."""
        for before, after in zip(encode(text), encode(text[1:]), strict=False):
            self.logits[before, after] = 50.0

    def logprob(self, context: str, continuation: str) -> float:
        ids, start = [0, *encode(context + continuation)], len(context) + 1
        rows = self.logits[ids[start - 1 : -1]].astype(np.float64)
        return float((rows[np.arange(len(rows)), ids[start:]] - np.log(np.exp(rows).sum(-1))).sum())


QUESTIONS = [
    {"question": "which is a fruit?", "choices": ["apple", "brick", "chair of wood"], "gold": 0},
    {"question": "which can fly?", "choices": ["stone", "a swallow", "fish"], "gold": 1},
    {"question": "which is cold?", "choices": ["fire", "sun", "ice"], "gold": 2},
    {"question": "which is big?", "choices": ["whale", "ant", "bee"], "gold": 0},
    {"question": "what is wet?", "choices": ["sand", "rain", "dust"], "gold": 1},
]

YAML = {
    "choice": """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "q: {{{{question}}}}\\na:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
""",
    "rolling": """
task: toy_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question * 9}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
""",
    "lambada": """
task: toy_lambada
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
""",
    "generate": """
task: toy_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
""",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of local tasks over a JSONL file, and a data set cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in QUESTIONS))
    place = tmp_path / "tasks"
    place.mkdir()
    for name, text in YAML.items():
        (place / f"{name}.yaml").write_text(text.format(data=data))
    return place


def run(model: Any, names: list[str], folder: Path, limit: int = 100) -> Any:
    return tasks.run(
        model, Letters(), names, [], end_of_text=0, limit=limit, tasks_path=folder, batch_tokens=80
    )


def test_choices_are_scored_as_by_hand(folder: Path) -> None:
    model = Table()
    result = run(model, ["toy_choice"], folder)["toy_choice"]
    right = normed = 0
    for row, item in zip(QUESTIONS, result["items"], strict=True):
        expected = [model.logprob(f"q: {row['question']}\na:", " " + choice) for choice in row["choices"]]
        assert item["logprobs"] == pytest.approx(expected, abs=1e-5)
        by_length = [value / len(choice) for value, choice in zip(expected, row["choices"], strict=True)]
        assert item["acc"] == (int(np.argmax(expected)) == row["gold"])
        assert item["acc_norm"] == (int(np.argmax(by_length)) == row["gold"])
        right, normed = right + item["acc"], normed + item["acc_norm"]
    assert result["metrics"]["acc"]["value"] == result["value"] == right / 5
    assert result["metrics"]["acc_norm"]["value"] == normed / 5
    assert (result["metric"], result["n"], result["higher_is_better"]) == ("acc", 5, True)
    assert result["metrics"]["acc"]["interval"] == "wilson"
    json.dumps(result, allow_nan=False)


def test_limit_takes_the_first_items(folder: Path) -> None:
    result = run(Table(), ["toy_choice"], folder, limit=2)["toy_choice"]
    assert [item["id"] for item in result["items"]] == ["toy_choice#0", "toy_choice#1"]


def test_rolling_texts_longer_than_the_context_are_predicted_once(folder: Path) -> None:
    model = Table(context=16)
    result = run(model, ["toy_rolling"], folder)["toy_rolling"]
    texts = [row["question"] * 9 for row in QUESTIONS]
    nll = -sum(model.logprob("", text) for text in texts)
    words = sum(len(text.split()) for text in texts)
    assert result["metrics"]["word_perplexity"]["value"] == pytest.approx(math.exp(nll / words), rel=1e-6)
    assert result["metrics"]["bits_per_byte"]["value"] == pytest.approx(
        nll / sum(map(len, texts)) / math.log(2), rel=1e-6
    )
    assert result["metrics"]["word_perplexity"]["low"] is not None


def test_aggregates_made_from_items_equal_lm_evals_own(folder: Path) -> None:
    from lm_eval.evaluator import evaluate

    model = HarnessModel(Table(), encode, decode, 0)
    names = ["toy_choice", "toy_rolling", "toy_lambada"]
    loaded = {name: task for group in catalog.load(names, folder)[0].values() for name, task in group.items()}
    ours = run(Table(), names, folder)
    with catalog.quiet():
        theirs: Any = evaluate(lm=model, task_dict={"tasks": loaded, "groups": {}}, bootstrap_iters=0)
    for name in names:
        for metric, record in ours[name]["metrics"].items():
            if metric.startswith("gold_"):
                continue  # ours alone
            assert record["value"] == pytest.approx(theirs["results"][name][f"{metric},none"], rel=1e-9)
            assert record["low"] <= record["value"] <= record["high"]


def test_the_main_metric_counts_right_answers_where_one_does(folder: Path) -> None:
    # LAMBADA's own list has the perplexity first; a mean over tasks takes its accuracy.
    result = run(Table(), ["toy_lambada"], folder)["toy_lambada"]
    assert (result["metric"], [*result["metrics"]]) == ("acc", ["acc", "perplexity"])
    paired = compare_task(result, run(Table(1), ["toy_lambada"], folder)["toy_lambada"])
    assert paired["metrics"]["perplexity"]["nll_difference"]["per"] == "item"


def test_a_metric_of_the_whole_task_is_carried_over_without_interval(folder: Path) -> None:
    text = YAML["choice"].format(data=folder.parent / "questions.jsonl").replace("toy_choice", "toy_f1")
    (folder / "f1.yaml").write_text(text.split("  - {metric: acc,")[0] + "  - {metric: mcc}\n")
    first, second = (run(Table(seed), ["toy_f1"], folder)["toy_f1"] for seed in (0, 1))
    assert (first["metric"], first["low"], first["definitions"]) == ("mcc", None, {})
    assert "whole task" in first["metrics"]["mcc"]["reason"]
    pair = compare_task(first, second)
    assert (pair["low"], pair["metrics"]) == (None, {})
    assert pair["difference"] == second["value"] - first["value"]


def test_generated_text_ends_at_the_stop_string(folder: Path) -> None:
    model = Table()
    model.say("?rain.")
    result = run(model, ["toy_generate"], folder)["toy_generate"]
    assert [item["exact_match"] for item in result["items"]] == [0, 0, 0, 0, 1]


def generate(model: Table, prompt: str, **options: Any) -> str:
    request = Instance("generate_until", {}, (prompt, options), 0, ("t", 0, 1))
    return HarnessModel(model, encode, decode, 0).generate_until([request])[0]


def test_stop_strings_are_found_past_the_first_block() -> None:
    model = Table(context=200)
    model.logits[:] = 0
    cycle = "abcdefghijklmnopqrstuvwxyz"
    model.say(cycle)
    model.logits[LETTERS.index("z"), LETTERS.index("a")] = 50.0
    whole = (cycle * 9)[1:]
    assert generate(model, "a", max_gen_toks=150) == whole[:150]
    assert generate(model, "a", max_gen_toks=150, until="zab") == whole[: whole.index("zab")]
    model.prompts.clear()
    assert generate(model, "a", max_gen_toks=150, until=["yz", "nothing"]) == whole[: whole.index("yz")]
    assert len(model.prompts) == 1


def test_generation_ends_at_end_of_text_and_at_the_limit() -> None:
    model = Table()
    model.say("abc\x00")
    assert generate(model, "a") == "bc"
    assert generate(model, "a", max_gen_toks=1) == "b"
    assert generate(model, "a", max_new_tokens=1) == "b"


def test_a_long_prompt_is_cut_on_the_left_and_counted() -> None:
    model = Table(context=32)
    harness = HarnessModel(model, encode, decode, 0)
    prompt = "the quick brown fox jumps over the lazy dog"
    harness.generate_until([Instance("generate_until", {}, (prompt, {"max_gen_toks": 8}), 0, ("t", 0, 1))])
    assert decode(model.prompts[0]) == prompt[-24:]
    assert harness.truncated == 1


def test_a_prompt_keeps_half_of_the_context_at_least() -> None:
    model = Table(context=32)
    prompt = "the quick brown fox jumps over the lazy dog"
    generate(model, prompt, max_gen_toks=256)
    assert decode(model.prompts[0]) == prompt[-16:]
    model.prompts.clear()
    generate(model, "fox", max_gen_toks=256)
    assert decode(model.prompts[0]) == "fox"


def test_a_sampling_task_is_refused_before_anything_is_trained(folder: Path) -> None:
    text = (folder / "generate.yaml").read_text().replace("toy_generate", "sampled")
    (folder / "sampled.yaml").write_text(
        text.replace("do_sample: false", "do_sample: true, temperature: 0.7")
    )
    with pytest.raises(BadInput, match=r"sampled asks for sampled text .*do_sample: false"):
        catalog.load(["sampled"], folder)


def test_long_texts_read_in_other_contexts_are_not_the_same_items(folder: Path) -> None:
    names = ["toy_rolling", "toy_choice"]
    wide, narrow = (run(Table(context=context), names, folder) for context in (64, 16))
    for name in names:  # all choices are longer than 16
        asked = [{item["asked"] for item in one[name]["items"]} for one in (wide, narrow)]
        assert not asked[0] & asked[1]
    again = run(Table(context=48), ["toy_choice"], folder)["toy_choice"]
    assert again["items_sha256"] == wide["toy_choice"]["items_sha256"]  # none was cut


def test_a_group_of_tasks_without_metrics_by_item_gives_each(folder: Path) -> None:
    text = YAML["choice"].format(data=folder.parent / "questions.jsonl")
    for name in ("f1_a", "f1_b"):
        made = text.replace("toy_choice", name).split("  - {metric: acc,")[0] + "  - {metric: mcc}\n"
        (folder / f"{name}.yaml").write_text(made)
    (folder / "both.yaml").write_text("group: both_f1\ntask: [f1_a, f1_b]\n")
    assert sorted(run(Table(), ["both_f1"], folder)) == ["f1_a", "f1_b"]


def test_an_empty_text_is_left_out_of_a_rolling_task(folder: Path) -> None:
    rows = [*QUESTIONS, {"question": "", "choices": ["a", "b", "c"], "gold": 0}]
    (folder.parent / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert run(Table(), ["toy_rolling"], folder)["toy_rolling"]["n"] == len(QUESTIONS)


def test_sampling_is_refused_with_what_would_work() -> None:
    with pytest.raises(BadInput, match="do_sample: false"):
        generate(Table(), "a", do_sample=True, temperature=0.7)


def test_items_longer_than_the_context_are_counted(folder: Path) -> None:
    model = Table(context=16)
    result = run(model, ["toy_choice"], folder)["toy_choice"]
    assert result["truncated"] == sum(len(row["choices"]) for row in QUESTIONS)
    expected = model.logprob("q: which is a fruit?\na:", " apple")
    assert result["items"][0]["logprobs"][0] == pytest.approx(expected, abs=1e-5)


def test_two_models_are_paired_over_an_lm_eval_task(folder: Path) -> None:
    first, second = (run(Table(seed), ["toy_choice"], folder)["toy_choice"] for seed in (0, 1))
    pair = compare_task(first, second)
    assert set(pair["metrics"]) == {"acc", "acc_norm", "gold_nll", "gold_bits_per_byte"}
    assert pair["difference"] == pytest.approx(second["value"] - first["value"])


def test_scoring_leaves_global_random_state_logging_and_bars_as_they_were(folder: Path) -> None:
    random.seed(5)
    np.random.seed(5)
    logger = logging.getLogger("lm_eval")
    before = random.getstate(), np.random.get_state()[1].tolist(), logger.level, lm_eval.api.task.tqdm
    run(Table(), ["toy_choice"], folder)
    after = random.getstate(), np.random.get_state()[1].tolist(), logger.level, lm_eval.api.task.tqdm
    assert after == before


def test_scoring_is_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(Table(), ["toy_choice"], folder)
    assert capfd.readouterr() == ("", "")


def test_a_data_set_on_a_hub_that_is_not_there_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(catalog, "HUB_TIMEOUT_S", 1.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (folder / "far.yaml").write_text(
        YAML["choice"].format(data="x").replace("toy_choice", "toy_far").replace("json", "no-such/set")
    )
    told = r"toy_far cannot be loaded: its data set is no-such/set on the hub.*heldout_.*tasks_path"
    found, missing = catalog.load(["toy_far", "toy_choice"], folder)
    assert [*found] == ["toy_choice"] and [*missing] == ["toy_far"]
    assert re.search(told, missing["toy_far"])
    with pytest.raises(BadInput, match=told):  # nothing else is left to score
        run(Table(), ["toy_far"], folder)


def test_a_local_data_file_that_is_missing_is_named(folder: Path) -> None:
    (folder / "gone.yaml").write_text(
        YAML["choice"].format(data="gone.jsonl").replace("toy_choice", "toy_gone")
    )
    with pytest.raises(BadInput, match=r"toy_gone cannot be loaded: its data cannot be read .*gone\.jsonl"):
        catalog.load(["toy_gone"], folder)


def test_a_tag_gives_its_tasks(folder: Path) -> None:
    for name in ("choice", "lambada"):
        path = folder / f"{name}.yaml"
        path.write_text(path.read_text() + "tag: toys\n")
    assert sorted(catalog.load(["toys"], folder)[0]) == ["toy_choice", "toy_lambada"]


def test_a_group_of_tasks_scored_alike_is_one_result_over_their_items(folder: Path) -> None:
    other = YAML["choice"].format(data=folder.parent / "others.jsonl").replace("toy_choice", "toy_other")
    (folder / "other.yaml").write_text(other)
    rows = [{**row, "question": row["question"][::-1]} for row in QUESTIONS[:3]]
    (folder.parent / "others.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "group.yaml").write_text("group: toy_both\ntask: [toy_choice, toy_other]\n")
    model = Table()
    pooled = run(model, ["toy_both"], folder)["toy_both"]
    parts = run(model, ["toy_choice", "toy_other"], folder)
    assert pooled["n"] == 8 and pooled["chance"] == pytest.approx(1 / 3)
    mean = (5 * parts["toy_choice"]["value"] + 3 * parts["toy_other"]["value"]) / 8
    assert pooled["value"] == pytest.approx(mean)
    assert [one["id"] for one in pooled["items"][4:6]] == ["toy_choice#4", "toy_other#0"]
    halved = run(model, ["toy_both"], folder, limit=4)["toy_both"]
    each = [f"toy_{name}#{number}" for name in ("choice", "other") for number in (0, 1)]
    assert [one["id"] for one in halved["items"]] == each


def test_a_group_of_unlike_tasks_gives_each(folder: Path) -> None:
    (folder / "group.yaml").write_text("group: toy_mixed\ntask: [toy_choice, toy_lambada]\n")
    assert sorted(run(Table(), ["toy_mixed"], folder)) == ["toy_choice", "toy_lambada"]


def test_the_right_answers_log_likelihood_is_told_with_its_bytes(folder: Path) -> None:
    model = Table()
    result = run(model, ["toy_choice"], folder)["toy_choice"]
    golds = [" " + row["choices"][row["gold"]] for row in QUESTIONS]
    nlls = [-model.logprob(f"q: {row['question']}\na:", gold) for row, gold in zip(QUESTIONS, golds)]
    assert result["metrics"]["gold_nll"]["value"] == pytest.approx(np.mean(nlls), rel=1e-6)
    bits = sum(nlls) / sum(map(len, golds)) / math.log(2)
    assert result["metrics"]["gold_bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-6)
    assert result["chance"] == pytest.approx(1 / 3)


def test_what_was_scored_before_is_not_asked_again(folder: Path, tmp_path: Path) -> None:
    names, store = ["toy_choice", "toy_rolling", "toy_generate"], tmp_path / "scores.sqlite"
    suite = tasks.prepare(Letters(), names, [], end_of_text=0, tasks_path=folder)
    plain = suite.run(Table())
    with closing(Kept(store, "a")) as kept:
        assert suite.run(Table(), kept=kept) == plain
    silent = Table()
    silent.logits = silent.logits * np.nan  # a model that cannot answer anything any more
    with closing(Kept(store, "a")) as kept:
        assert suite.run(silent, kept=kept) == plain
    assert silent.prompts == []
    with closing(Kept(store, "b")) as kept, pytest.raises(BuildFailed, match="not finite"):
        suite.run(silent, kept=kept)


@pytest.mark.parametrize("lead", [None, 257])
def test_log_likelihoods_and_text_equal_those_of_lm_evals_torch_backend(lead: int | None) -> None:
    import torch
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(
        models.BPE(vocab={letter: k for k, letter in enumerate(["<end>", *letters, "<begin>"])}, merges=[])
    )
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    if lead is not None:  # a tokenizer like Gemma's or Llama 3's
        bare.post_processor = processors.TemplateProcessing("<begin> $A", None, [("<begin>", lead)])
    bos = "<end>" if lead is None else "<begin>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token="<end>", pad_token="<end>", bos_token=bos
    )
    assert bos_id(tokenizer) == lead
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
        )
        llama = LlamaForCausalLM(config).eval()

    class Llama:
        vocab_size, context = 258, 64
        tree_nodes, packs = 0, True

        def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
            with torch.inference_mode():
                return np.asarray(llama(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits)

        def greedy(self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
            with torch.inference_mode():
                out = llama.generate(
                    torch.tensor([ids]),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=[*stop_ids],
                )
            return out[0, len(ids) :].tolist()

    def encoded(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    ours = HarnessModel(Llama(), encoded, tokenizer.decode, 0, lead=lead)
    theirs = HFLM(pretrained=llama, tokenizer=tokenizer, batch_size=3, device="cpu", max_length=64)
    texts = [
        "the tide was out and the boats lay on their sides",
        "a bell rang twice",
        "snow fell on the mill all day",
    ]

    def ask(kind: str, *arguments: Any) -> list[Instance]:
        return [Instance(kind, {}, args, 0, ("t", 0, 1)) for args in arguments]

    pairs = ask("loglikelihood", *[(text[:cut], text[cut : cut + 9]) for text in texts for cut in (0, 5, 13)])
    rolling = ask("loglikelihood_rolling", *[(text * 4,) for text in texts])
    # A prompt that is cut keeps its lead here, not there.
    options = {"until": ["e"], "max_gen_toks": 20 if lead is None else 13, "do_sample": False}
    prompts = ask("generate_until", *[(text, dict(options)) for text in texts])
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    found = ours.loglikelihood(pairs)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    if lead is None:  # theirs forgets the lead from the second window on
        assert ours.loglikelihood_rolling(rolling) == pytest.approx(
            theirs.loglikelihood_rolling(rolling, disable_tqdm=True), abs=2e-3
        )
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)
