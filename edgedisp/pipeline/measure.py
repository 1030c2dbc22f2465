"""Everything that a build measures of one model, an arm at a precision, in one stage.

For a bundle first the parity verdict, which stops a build; then how far its next-token distributions lie from
its fp32 parent's and from the baseline's bundle. For every model the geometry of its hidden states, on blocks
that all models of a run share, its scores on the recipe's tasks, item by item, and, for one model of a
precision, the noise floor. Latency is a stage of its own, over all bundles in turns.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgedisp import models
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.interleaved_timing import Local
from edgedisp.bench.system import installed_version, runner
from edgedisp.core.errors import BuildFailed
from edgedisp.core.files import digest, from_json, list_files, to_json, write_json
from edgedisp.core.progress import Progress, labelled
from edgedisp.core.results import LOSS_TASK, Condensation, Divergence, Measurement, NoiseFloor, Parity
from edgedisp.core.stage_folder import SCORES, read
from edgedisp.dispersion.condensation import Profile, measure_model, profile, summary
from edgedisp.evaluate.comparison import Results, compare_task
from edgedisp.evaluate.loglikelihood import ScoreCache, ScoreOptions, compare_logits
from edgedisp.evaluate.statistics import Resampling
from edgedisp.evaluate.task_suite import TaskSuite
from edgedisp.graph.runtime_layouts import for_device
from edgedisp.graph.session import HiddenStates, OnnxModel, at_accuracy_level
from edgedisp.graph.verify import check_bundle
from edgedisp.pipeline.options import ITEMS, LatencyOptions, MeasureOptions, ParityOptions
from edgedisp.pipeline.prepare import CONDENSATION_BLOCKS, heldout_blocks, heldout_documents, task_suite
from edgedisp.pipeline.rounding import trained_roundings
from edgedisp.pipeline.stage import Inputs
from edgedisp.train.quantized_weights import round_weights

NOISE_TOKENS, DECODED_TOKENS = 8192, 2048  # read at most, and by a bundle, which decodes half of them
PROFILE = "condensation.json"  # with the figures of every sequence
PROMPTS, NEW_TOKENS = 4, 16  # real prompts decoded greedily with the cache, and how many tokens of each
AS_TRAINED = 1e-3  # largest difference of a logit between the graph in fp32 and the torch model rounded alike


def measure(options: MeasureOptions, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Measure a model: a `Measurement` as JSON; every item in items.json.

    Inputs: model, base, corpus, items; bundle, without which the torch model is measured; parent, baseline:
    bundles that this one is compared with; reference: the measurement that the condensation's `change` is
    from. Raises BuildFailed where a bundle does not agree with the torch model, and where a task's data was
    there for the items and cannot be read now: every arm answers the same tasks.
    """
    suite, bundle = task_suite(options.items, inputs), inputs.get("bundle")
    missing = json.loads((inputs["items"] / ITEMS).read_text(encoding="utf-8"))["missing"]
    if lost := [reason for task, reason in suite.missing.items() if task not in missing]:
        raise BuildFailed(f"{'; '.join(lost)}. It could be read before; the same command continues")
    # One cache serves the run, whatever is measured: its entries are named by all that a score depends on.
    scorer = Scorer(bundle or inputs["model"], options.threads, inputs["base"].parent / SCORES)
    verdict = geometry = None
    divergences: dict[str, Divergence] = {}
    if bundle is not None and options.parity is not None:
        verdict = parity(options.parity, inputs["model"], scorer.model, inputs["corpus"], progress)
    if options.hidden_states:
        bundles = {name: inputs[name] for name in ("parent", "baseline") if name in inputs}
        if bundles:
            divergences = compare_logits(  # no name for the references: nothing keeps them in memory
                {name: OnnxModel(folder, options.threads) for name, folder in bundles.items()},
                scorer.model,
                heldout_blocks(inputs["corpus"], tokens=options.divergence_tokens),
                progress,
            )
        geometry = condensation(inputs, scorer.model, output_dir, progress)
    results = scorer.score(suite, options.bootstrap, progress)
    write_json(output_dir / ITEMS, to_json(results))
    floor = scorer.noise_floor(suite, options.bootstrap, progress) if options.noise else None
    scores = {task: result.score for task, result in results.items()}
    return dict(to_json(Measurement(scores, geometry, divergences, verdict, floor)))


def condensation(inputs: Inputs, model: Any, output_dir: Path, progress: Progress) -> Condensation:
    """Of a bundle or torch model, with its `change` if `reference` is among the inputs; the figures of every
    sequence in condensation.json."""
    blocks = torch.from_numpy(heldout_blocks(inputs["corpus"], blocks=CONDENSATION_BLOCKS))
    if "bundle" in inputs:
        measured = measure_bundle(inputs["bundle"], blocks, model.threads, progress)
    else:
        measured = measure_model(model.model, blocks, progress)
    write_json(output_dir / PROFILE, to_json(measured))
    if "reference" not in inputs:
        return summary(measured)
    text = (inputs["reference"] / PROFILE).read_text(encoding="utf-8")
    return summary(measured, from_json(Profile, json.loads(text)))


def measure_bundle(bundle: Path, blocks: Tensor, threads: int, progress: Progress) -> Profile:
    """The profile of a bundle over token blocks, int64 [sequences, tokens]."""
    graph = HiddenStates(bundle, threads)
    return profile(lambda block: [*map(torch.from_numpy, graph(block.numpy()))], blocks, progress)


class Scorer:
    """A Hugging Face folder or a bundle, opened as `model`, whose scores are cached in the file `cache`: an
    interrupted scoring continues, and a task that is added costs no more than itself."""

    def __init__(self, folder: Path, threads: int, cache: Path) -> None:
        self.folder, self.threads, self.cache = folder, threads, cache
        self.is_bundle = (folder / "model.onnx").is_file()
        self.key = score_key(folder, 1 if self.is_bundle else threads)
        self.model: Any
        if self.is_bundle:
            self.model = OnnxModel(folder, threads)
        else:
            self.model = models.TorchModel(models.load(folder), threads)

    def score(self, suite: TaskSuite, bootstrap: int, progress: Progress) -> Results:
        """The scores on all tasks, through the cache."""
        with closing(ScoreCache(self.cache, self.key)) as cache:
            return suite.run(self.model, ScoreOptions(cache=cache, progress=progress), bootstrap)

    def noise_floor(self, suite: TaskSuite, bootstrap: int, progress: Progress) -> NoiseFloor | None:
        """How far two scorings of this model differ in the held-out loss (None without that task): sums in
        another order give other last bits, in int8 now and then a whole step of an activation, and thirty
        layers later a token by a tenth of a nat. A difference of two models that is no larger means nothing.

        A bundle reads half of each text token by token; a torch model takes other threads, and another
        attention. The floor: the larger of the shift and of what chance leaves in a mean over all documents.
        """
        questions = suite.questions.get(LOSS_TASK)
        if not questions:
            return None
        most = DECODED_TOKENS if self.is_bundle else NOISE_TOKENS
        totals = accumulate(len(question.requests[0][1]) for question in questions)
        part = [question for question, total in zip(questions, totals) if total <= most] or questions[:1]
        sample = replace(suite, questions={LOSS_TASK: part}, harness_tasks={})
        usual = self.score(sample, bootstrap, labelled(progress, "noise floor, as scored"))[LOSS_TASK]
        if self.is_bundle:
            variants: dict[str, Any] = {"decoding": TokenByToken(self.model)}
        else:
            eager, threads = models.load(self.folder), self.threads - 1 if self.threads > 1 else 2
            eager.set_attn_implementation("eager")
            variants = {"threads": models.TorchModel(self.model.model, threads)}
            variants["attention"] = models.TorchModel(eager, self.threads)
        changes = {}
        for name, variant in variants.items():
            options = ScoreOptions(progress=labelled(progress, f"noise floor, other {name}"))
            pair = usual, sample.run(variant, options, bootstrap)[LOSS_TASK]
            change = compare_task([pair], Resampling(bootstrap, suite.options.seed)).main
            changes[name] = change.nats or change.estimate
        measured, documents = (len({question.document for question in each}) for each in (part, questions))
        share = math.sqrt(measured / documents)
        floors = [max(abs(each.value or 0.0), (each.half_width or 0.0) * share) for each in changes.values()]
        return NoiseFloor(max(floors), changes)


def score_key(folder: Path, threads: int) -> str:
    """Hash of all that a score depends on beside the question: the files, the runtimes, the processor, and
    the threads of one sequence (a bundle's take one each, however many run side by side)."""
    record = read(folder)
    files = list_files(folder) if record is None else record.files
    return digest(
        {
            "content": digest({name: entry["sha256"] for name, entry in files.items()}),
            "threads": threads,
            "processor": runner().cpu(),
            **{name: installed_version(name) for name in ("torch", "transformers", "onnxruntime")},
        }
    )


class TokenByToken:
    """A bundle that reads the second half of a sequence one token at a time through its cache, as it decodes:
    products with one row have kernels of their own, which sum in another order."""

    parallel = 1

    def __init__(self, model: OnnxModel) -> None:
        self.model, self.context, self.vocab_size = model, model.context, model.vocab_size

    def logits(self, ids: NDArray[np.int64], last: int) -> NDArray[np.float32]:
        rows = self.model.step_by_step(ids, max(1, len(ids) // 2))[-last:]
        if len(rows) < last:  # a graph that gives one row a run: it usually reads all token by token
            rows = np.concatenate([self.model.logits(ids, last)[: last - len(rows)], rows])
        return rows


# Parity


def parity(
    options: ParityOptions, model_folder: Path, bundle: OnnxModel, corpus: Path, progress: Progress
) -> Parity:
    """Whether a bundle runs (graph/verify.py), and has the logits over held-out blocks and the greedy text of
    the torch model that it was made from; BuildFailed if not. After quantization-aware training that model is
    rounded as it was trained, and the graph in fp32 arithmetic has to give its logits.
    """
    blocks = heldout_blocks(corpus, tokens=options.tokens)
    lengths = [max(2, blocks.shape[1] * (index + 1) // (4 * PROMPTS)) for index in range(PROMPTS)]
    prompts = [blocks[index % len(blocks)][:length].tolist() for index, length in enumerate(lengths)]
    texts = [document.text[:400] for document in heldout_documents(corpus)[:PROMPTS]]
    graph = check_bundle(bundle, prompts, texts=texts)
    torch_model, limits = models.load(model_folder), dict(options.limits)
    if options.trained_under is not None:
        round_weights(torch_model, *trained_roundings(options.trained_under, model_folder))
    reference = models.TorchModel(torch_model)
    figures = compare_logits({"torch": reference}, bundle, blocks, progress)["torch"]
    result = Parity(
        tokens=figures.tokens,
        max_abs_difference=figures.max_abs_difference,
        mean_kl=figures.mean_kl,
        top1_agreement=figures.top1_agreement,
        greedy_agreement=_greedy_agreement(reference, bundle, prompts),
        limits=dict(limits),
        genai=graph.pop("genai"),
        graph=graph,
        passed=True,
    )
    if options.trained_under is not None:
        exact = OnnxModel(bundle.bundle, bundle.threads, graph=at_accuracy_level(bundle.bundle, 0))
        largest = compare_logits({"torch": reference}, exact, blocks, progress)["torch"].max_abs_difference
        agreement = _greedy_agreement(reference, exact, prompts)
        as_trained = {"max_abs_difference": largest, "greedy_agreement": agreement}
        result = replace(result, as_trained=as_trained, max_abs_difference=largest)
        limits["max_abs_difference"] = AS_TRAINED
    broken = []
    for name, limit in limits.items():
        figure = float(getattr(result, name))
        if limit is not None and (figure < limit if name == "top1_agreement" else figure > limit):
            broken.append(f"{name} is {figure:.4g}, the limit is {limit:.4g}")
    if broken:
        raise BuildFailed(
            f"{bundle.bundle.parent.name}/{bundle.bundle.name} does not agree with the torch model: "
            f"{'; '.join(broken)}. If that is good enough for you, set the limit under `verify` in the recipe"
        )
    return result


def _greedy_agreement(reference: models.TorchModel, bundle: OnnxModel, prompts: Sequence[list[int]]) -> float:
    """Share of greedily decoded tokens that are equal, up to the first difference in each text. Up to there
    both read the same, so the reference need not decode: it reads the bundle's text at once."""
    same = 0
    for prompt in prompts:
        text = bundle.greedy(prompt, NEW_TOKENS, frozenset())
        ids = np.array([*prompt, *text[:-1]], np.int64)
        likeliest = reference.logits(ids, len(text)).argmax(axis=-1).tolist()
        same += next((i for i, pair in enumerate(zip(text, likeliest)) if pair[0] != pair[1]), len(text))
    return same / (len(prompts) * NEW_TOKENS)


# Latency


def latency(options: LatencyOptions, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Time every bundle (label -> folder) on this machine in turns; twins must have one graph.

    What is timed is what a device gets: the same weights under a graph for the last token's logits.
    """
    section, threads, scratch = options.latency, options.threads, output_dir / "timed"
    bundles = {label: scratch / label.replace("/", "-") for label in inputs}
    for label, bundle in bundles.items():
        bundle.mkdir(parents=True)
        for_device(inputs[label], bundle, threads=threads, link=True)
    keys = section.model_dump(include={"prompt", "generate", "repetitions", "pause_s"})
    results = Local(bundles, BenchOptions(**keys, threads=threads, seed=options.seed)).measure(progress)
    if results.lost:
        raise BuildFailed(f"latency: {results.lost}")
    shutil.rmtree(scratch)
    write_json(output_dir / "latency.json", to_json(results))
    return dict(to_json(replace(results, repetitions=[])))
