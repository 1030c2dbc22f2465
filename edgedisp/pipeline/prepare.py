"""The start that all arms share: the base weights, the one tokens file, the questions; and reading these."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedisp import data, models
from edgedisp.core.files import file_digest, write_json
from edgedisp.core.progress import Progress
from edgedisp.evaluate.heldout_tasks import SuiteOptions
from edgedisp.evaluate.task_suite import TaskSuite, prepare
from edgedisp.graph.architectures import check_export
from edgedisp.pipeline import chat_corpus
from edgedisp.pipeline.chat_corpus import Packed
from edgedisp.pipeline.options import ITEMS, TASKS_PATH, BaseOptions, CorpusOptions, ItemsOptions
from edgedisp.pipeline.stage import Inputs
from edgedisp.quantize.calibration import CalibrationText
from edgedisp.recipe import Data, Source
from edgedisp.report.formatting import percent, plural

PACKING = "packing.json"  # how the blocks of the corpus folder are to be read in training
SMOKE_CONTEXT = 512  # least positions of a smoke run's base
CONDENSATION_BLOCKS = 16  # held-out; a few seconds for 135M parameters
MOST_EPOCHS = 2  # of the training text without a word
SYNTHETIC_DOCUMENTS = 200  # for a smoke run whose text is on a hub; 10 % held out make every task's items


def read_documents(
    section: Data, smoke: bool, progress: Progress, files: Mapping[str, Path] | None = None
) -> data.Documents:
    """The documents of a recipe; files: source -> local path, for its local sources.

    A smoke run of hub data takes synthetic text instead of the hub's.
    """
    documents = data.Documents()
    for source in section.train:
        local = str((files or {}).get(source.source, source.source))
        path = data.fetch(local, sha256=source.sha256, progress=progress)
        if smoke and isinstance(path, str):
            count = source.limit or SYNTHETIC_DOCUMENTS
            make = data.synthetic_conversations if source.is_chat else data.synthetic_documents
            documents.add(make(count, seed=len(documents)))
        else:
            documents.add(data.read_documents(path, source, progress))
    return documents


def open_base(
    options: BaseOptions, files: Mapping[str, Path], progress: Progress, *, weights: bool = True
) -> tuple[Any, Any, Path | str | None]:
    """(model, tokenizer, source) of a recipe's base, in float32; source: a path or a hub id. Raises BadInput
    for a model that could not be exported in the end.

    A smoke run gets a tiny random model of the recipe's architecture with a tokenizer made from the text, and
    no source. files: source -> local path. Without `weights` (`models.empty_model`) a hub's tokenizer is not
    opened: None.
    """
    section = options.model
    if options.smoke_text is not None:
        texts = [document.text for document in read_documents(options.smoke_text, True, progress, files)]
        context = max(SMOKE_CONTEXT, options.context)
        tiny = models.tiny_model(section.architecture or "", texts, seed=options.seed, context=context)
        check_export(tiny[0])
        return *tiny, None
    local = str(files.get(section.base, section.base))
    source = data.fetch(local, sha256=section.sha256, progress=progress)
    with models.gguf_read_once():
        model: Any = models.empty_model(source, section)
        check_export(model)  # before weights are downloaded
        if weights:
            return *models.open_base(source, section, progress), source
        if isinstance(source, Path):
            return model, models.load_tokenizer(source, section.trust_remote_code), source
    return model, None, source


def base(options: BaseOptions, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """The base model as a Hugging Face folder in float32: the one set of weights that all arms start from."""
    section = options.model
    model, tokenizer, source = open_base(options, inputs.files, progress)
    models.save(model, tokenizer, output_dir)
    record = {
        "architecture": model.config.model_type,
        "parameters": models.count_parameters(model),
        "max_context": models.context_length(model.config),
        "weights_sha256": weights_digest(output_dir),
    }
    if source is None:
        return record
    if isinstance(source, str):  # by a hub's name others can open the base that an adapter needs
        record |= {"hub_id": source, "revision": section.revision}
        source = Path(model.name_or_path)
    licence = models.copy_licence(source, output_dir, section.base)
    return record | {"license": licence["license"], "license_files": licence["files"]}


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weight files of a Hugging Face folder, joined by `+`."""
    return "+".join(file_digest(path) for path in sorted(folder.glob("*.safetensors")))


def corpus(options: CorpusOptions, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """The one tokens file that every arm reads, in the order it is read, and the documents held out of it."""
    section = options.data
    training, heldout, text = read_split(section, options.seed, options.smoke, progress, inputs.files)
    tokenizer = models.load_tokenizer(inputs["base"])
    end_of_text = models.end_of_text_id(tokenizer)
    packing = {"end_of_text": end_of_text, "isolate_documents": section.isolate_documents}
    write_json(output_dir / PACKING, packing)
    if section.has_chat:
        packed = chat_corpus.pack(tokenizer, (training, heldout), options, output_dir, progress)
    else:
        encode = models.document_encoder(tokenizer)
        count = chat_corpus.block_count(options, lambda: data.count_tokens(training, encode, progress))
        texts = data.training_blocks(training, encode, section.context, count, options.seed, progress)
        packed = Packed(*texts, heldout, data.pack(heldout, encode, section.context, progress=progress))
    np.save(output_dir / "tokens.npy", packed.blocks, allow_pickle=False)
    np.save(output_dir / "heldout.npy", packed.heldout_blocks, allow_pickle=False)
    lines = [json.dumps(document.row(), ensure_ascii=False) for document in packed.heldout]
    (output_dir / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text |= _special_tokens(tokenizer, [*training, *heldout])
    unasked = packed.epochs if options.epochs is None else 0  # passes that no recipe names
    names = [source.source for source in section.train]
    from_hub = {name for name in names if name not in inputs.files and not name.startswith("pypi:")}
    return {
        "tokens_sha256": file_digest(output_dir / "tokens.npy"),
        "train_tokens": int(packed.blocks.size),
        "train_documents": len(training),
        "heldout_documents": len(packed.heldout),
        "heldout_tokens": int(packed.heldout_blocks.size),
        "text": text,
        "chat": packed.chat,
        "notes": [*text_notes(text, section.heldout, unasked), *packed.notes],
        "epochs": packed.epochs,
        "context": section.context,
        "sources": [  # a smoke run does not read the hub's
            f"made text in the place of {name}" if options.smoke and name in from_hub else name
            for name in names
        ],
    }


def read_split(
    section: Data, seed: int, smoke: bool, progress: Progress, files: Mapping[str, Path] | None = None
) -> tuple[data.Documents, data.Documents, dict[str, Any]]:
    """(documents to train on, held-out documents, account of the text that was read, as JSON)."""
    documents = read_documents(section, smoke, progress, files)
    training, heldout = data.split(documents, section.heldout, seed)
    documents.dropped += training.dropped
    trained, scored = (sum(len(document.text) for document in part) for part in (training, heldout))
    counts = documents.counts() | {"documents": len(training) + len(heldout), "characters": trained + scored}
    return training, heldout, counts | {"heldout_share": scored / (trained + scored)}


def _special_tokens(tokenizer: Any, documents: Sequence[data.Document]) -> dict[str, Any]:
    """Special tokens that are written in texts, as characters; texts in which they are tokens."""
    pattern, is_rendered = models.special_tokens(tokenizer), models.rendered_by(tokenizer)
    texts = [document.text for document in documents if not isinstance(document, data.Conversation)]
    plain = [text for text in texts if not is_rendered(text)]
    counts = Counter(token for text in plain for token in pattern.findall(text))
    return {"special_tokens_as_text": dict(counts), "rendered_documents": len(texts) - len(plain)}


def text_notes(text: Mapping[str, Any], heldout: float, epochs: float) -> list[str]:
    """What was read and what became of it; then files skipped, a lopsided split, repetition."""
    read = plural(text["rows_read"], "row")
    if files := text["files_read"]:  # none of a hub's data set
        read += f" of {plural(files, 'file')}"
    if dropped := text["dropped"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        read += f", {sum(dropped.values()):,} dropped ({reasons})"
    characters = f"{text['characters']:,} of {text['characters_read']:,} characters"
    lines = [f"{read}: {plural(text['documents'], 'document')}, {characters}"]
    if skipped := [f"{name} ({reason})" for name, reason in text["files_skipped"].items()]:
        more = ", ..." if len(skipped) > 3 else ""
        lines.append(f"{plural(len(skipped), 'file')} not read: {', '.join(skipped[:3])}{more}")
    if special := text.get("special_tokens_as_text"):
        counts = ", ".join(f"{token} {count} times" for token, count in special.items())
        lines.append(f"special tokens written in it are read as characters: {counts}")
    if rendered := text.get("rendered_documents"):
        lines.append(f"{plural(rendered, 'document')} of a chat template (a special token first) hold tokens")
    if not heldout / 2 <= (share := text["heldout_share"]) <= 2 * heldout:
        lines.append(
            f"{percent(share, 2)} of the characters are held out, not {percent(heldout, 2)} (data.heldout): "
            "documents are few, or of very different length"
        )
    if epochs > MOST_EPOCHS:
        lines.append(f"training reads it about {epochs:.1f} times: give more text, or a smaller train.tokens")
    return [f"text: {line}" for line in lines]


def training_text(corpus: Path) -> CalibrationText:
    """The training text as it is read, none of it in memory yet."""
    marks = corpus / chat_corpus.MARKS
    paths = [corpus / "tokens.npy", *([marks] if marks.is_file() else [])]
    return CalibrationText(*(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths))


def heldout_blocks(corpus: Path, *, blocks: int = 1, tokens: int = 0) -> NDArray[np.int64]:
    """The first held-out blocks, int64 [blocks, context]: at least so many, and at least so many tokens."""
    heldout = np.load(corpus / "heldout.npy", mmap_mode="r", allow_pickle=False)
    first: NDArray[np.int64] = heldout[: max(blocks, -(-tokens // heldout.shape[1]))].astype(np.int64)
    return first


def heldout_documents(corpus: Path) -> list[data.Document]:
    # Not splitlines(): it would also cut at the Unicode line separators inside a document.
    lines = (corpus / "heldout.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    return [
        data.Document(**row)
        if "text" in row
        else data.Conversation.of(row["id"], row["messages"], row["tools"])
        for row in rows
    ]


def task_suite(options: ItemsOptions, inputs: Inputs) -> TaskSuite:
    """The questions of the recipe's tasks: the same for every arm and precision."""
    keys = {"tasks", "limit", "perplexity_tokens", "trust_task_code", "answer_tokens"}
    section, tasks_path = options.evaluate.model_dump(include=keys), inputs.files.get(TASKS_PATH)
    suite = SuiteOptions(**section, context=options.context, seed=options.seed, tasks_path=tasks_path)
    return prepare(models.load_tokenizer(inputs["base"]), _question_documents(options, inputs), suite)


def _question_documents(options: ItemsOptions, inputs: Inputs) -> list[data.Document]:
    """What is held out, with the conversations of evaluate.answers in the place of those."""
    documents, name = heldout_documents(inputs["corpus"]), options.evaluate.answers
    if name is None:
        return documents
    source = Source.model_validate({"source": name, **options.answers})
    path = data.fetch(str(inputs.files.get(name, name)))
    texts = [document for document in documents if not isinstance(document, data.Conversation)]
    return [*texts, *data.read_documents(path, source)]


def items(options: ItemsOptions, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Make the questions before anything is trained, to find too little text or missing data early, and
    conversations of evaluate.answers that ask what the training data ask."""
    allow = options.evaluate.answers is None or options.evaluate.allow_training_rows
    documents, suite = _question_documents(options, inputs), task_suite(options, inputs)
    results = {
        "heldout_items": {name: len(questions) for name, questions in suite.questions.items()},
        "harness_tasks": sorted(suite.harness_tasks),
        "missing": suite.missing,
        "training_rows": chat_corpus.check_unseen(inputs["corpus"], documents, allow),
    }
    write_json(output_dir / ITEMS, results)
    return results
