"""New tokens per second: ours and transformers' `generate`. Writes results/generate_rate.json

    python benchmarks/generate_rate.py --model FOLDER --answers rows.jsonl [--bundles FOLDER ...] [--rounds 5]

The last answers of 150 chat rows are asked for greedily, in batches of 64 sorted by length: of a Hugging Face
folder in transformers (padded on the left) and here, and of bundles here, in turns. Ratios are medians over
rounds; `equal` counts the answers that are the same token for token.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _results_file import write

from edgedisp import data, models
from edgedisp.bench.interleaved_timing import turns
from edgedisp.bench.results import compare_speeds
from edgedisp.bench.system import physical_cores
from edgedisp.core.greedy_decoding import BATCH
from edgedisp.graph.session import OnnxModel
from edgedisp.recipe import Source

ROWS, NEW_TOKENS = 150, 32  # of an answer at most


class Transformers:
    """`generate` as the models of edgedisp are called."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def greedy_batch(self, prompts: list[list[int]], most: int, stop_ids: frozenset[int]) -> list[list[int]]:
        answers, settings = [], {"do_sample": False, "eos_token_id": sorted(stop_ids)}
        for start in range(0, len(prompts), BATCH):
            batch = self.tokenizer.pad({"input_ids": prompts[start : start + BATCH]}, return_tensors="pt")
            rows = self.model.generate(**batch, max_new_tokens=most, **settings)
            for row in rows[:, batch["input_ids"].shape[1] :].tolist():  # padded after its end
                length = next((place for place, token in enumerate(row, start=1) if token in stop_ids), most)
                answers.append(row[:length])
        return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--answers", type=Path, required=True, help="chat rows")
    parser.add_argument("--bundles", type=Path, nargs="*", default=[], help="such as <run>/<arm>/int4")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(threads := physical_cores())
    tokenizer, model = models.load_tokenizer(options.model), models.load(options.model)
    tokenizer.padding_side, stop_ids = "left", frozenset(models.end_of_turn_ids(tokenizer))
    rows = data.read_documents(options.answers, Source(source=str(options.answers), messages="messages"))
    prompts = sorted((row.prompt_ids for row in models.last_answers(tokenizer, rows[:ROWS])), key=len)
    runners = {"transformers": Transformers(model, tokenizer), "torch": models.TorchModel(model, threads)}
    runners |= {bundle.name: OnnxModel(bundle, threads) for bundle in options.bundles}
    answers, speeds = {}, {name: [] for name in runners}
    for turn, name in turns(list(runners), options.rounds + 1):
        started = time.perf_counter()
        answers[name] = runners[name].greedy_batch(prompts, NEW_TOKENS, stop_ids)
        if turn > 0:  # the first round warms up
            speeds[name].append(sum(map(len, answers[name])) / (time.perf_counter() - started))
    results = []
    for name, values in speeds.items():
        equal = sum(ours == theirs for ours, theirs in zip(answers[name], answers["transformers"]))
        ratio = compare_speeds(speeds["transformers"], values)
        results.append({"name": name, "tokens_per_s": values, "ratio": ratio, "equal": equal})
        print(results[-1])
    figures = {f"generate_rate_ratio_{row['name']}": row["ratio"]["ratio"] for row in results}
    figures["generate_rate_ratio_transformers"] = figures.pop("generate_rate_ratio_torch")
    write("generate_rate", figures, results)


if __name__ == "__main__":
    main()
