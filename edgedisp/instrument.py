"""`edgedisp condensation`: the condensation profile of a model or a bundle, alone or beside another.

A model is whatever `open_base` opens (a hub id, a Hugging Face folder, a .gguf file) or a bundle, a folder
with a model.onnx: then its graph is measured as it ships, quantized or not. Two are measured on the same
sequences, so their difference has paired intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgedisp import data, models
from edgedisp.bench.system import physical_cores
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import check_files
from edgedisp.dispersion.condensation import compare, measure_model
from edgedisp.graph.genai_config import context_length
from edgedisp.graph.session import read_config
from edgedisp.stages.condensation import measure_bundle, without_sequences

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
WORDS_TO_TOKENS = 50  # tokens in a made document, or more


@dataclass(frozen=True)
class _Opened:
    """A model ready to be measured: its tokenizer, the longest sequence it takes, and how it is measured."""

    name: str
    runs_on: str
    tokenizer: Any
    context: int
    measure: Callable[[Tensor, Progress], dict[str, Any]]


def condensation(
    base: str,
    other: str | None = None,
    *,
    text: Path | None = None,
    sequences: int = 16,
    context: int = 256,
    progress: Progress,
) -> dict[str, Any]:
    """Measure `base`, and `other` on the same sequences.

    `text` is a file or folder that the corpus reads; None takes made text. Returns the profile of `base` (see
    `dispersion/profile.py`) with `model` and `runs_on` (torch or onnxruntime); with `other` also `compared`,
    its profile, and `change`, the second less the first. BadInput: no model, a bundle whose hidden states
    cannot be found, too little text, more tokens than a model takes, tokenizers that differ on the text.
    """
    opened = _open(base, progress)
    blocks = _blocks(opened, text, sequences, context)
    measured = _measured(opened, blocks, progress)
    if other is None:
        return measured
    del opened  # one model in memory at a time
    second = _open(other, progress)
    _same_tokens(base, other, blocks, _blocks(second, text, sequences, context))
    compared = _measured(second, blocks, progress)
    return {**measured, "compared": compared, "change": compare(measured, compared)}


def plain(found: dict[str, Any]) -> dict[str, Any]:
    """The same without the figures of each sequence, as the command prints it."""
    shown = without_sequences(found)
    return {**shown, "compared": without_sequences(found["compared"])} if "compared" in found else shown


def _measured(opened: _Opened, blocks: Tensor, progress: Progress) -> dict[str, Any]:
    def told(done: int, total: int, note: str) -> None:
        progress(done, total, opened.name)

    return {"model": opened.name, "runs_on": opened.runs_on, **opened.measure(blocks, told)}


def _open(base: str, progress: Progress) -> _Opened:
    where = data.fetch(base, base_dir=Path.cwd(), progress=progress)
    if isinstance(where, Path) and _is_bundle(where):
        return _open_bundle(base, where)
    loaded, tokenizer = models.open_base(where, progress=progress)

    def measure(blocks: Tensor, told: Progress) -> dict[str, Any]:
        return measure_model(loaded, blocks, told)

    return _Opened(base, "torch", tokenizer, models.context_length(loaded.config), measure)


def _is_bundle(folder: Path) -> bool:
    """A folder with a graph; one that also has weights for torch counts as a model folder."""
    weights = any((folder / name).is_file() for name in SAFETENSORS)
    return (folder / "model.onnx").is_file() and not weights


def _open_bundle(base: str, folder: Path) -> _Opened:
    read_config(folder)  # says what is missing before the tokenizer does
    check_files(folder)

    def measure(blocks: Tensor, told: Progress) -> dict[str, Any]:
        return measure_bundle(folder, blocks, physical_cores(), told)

    return _Opened(base, "onnxruntime", models.load_tokenizer(folder), context_length(folder), measure)


def _blocks(opened: _Opened, text: Path | None, sequences: int, context: int) -> Tensor:
    """Token ids int64 [sequences, context] of the text, as the model's own tokenizer cuts it."""
    if context > opened.context:
        raise BadInput(
            f"{opened.name}: takes {opened.context} tokens at most, --context is {context}; "
            f"give --context {opened.context} or less"
        )
    if text is None:
        documents = data.synthetic_documents(sequences * context // WORDS_TO_TOKENS + 20, seed=0)
    else:
        documents = data.read_documents(text)
    name = str(text or "the made text")
    encoder, end = models.document_encoder(opened.tokenizer), models.end_of_text_id(opened.tokenizer)
    blocks = data.pack(documents, encoder, end, context, sequences, name=name)
    if len(blocks) < sequences:
        raise BadInput(f"{name}: holds {len(blocks)} blocks of {context} tokens, not {sequences}")
    return torch.from_numpy(blocks.astype(np.int64))


def _same_tokens(first: str, second: str, before: Tensor, after: Tensor) -> None:
    """BadInput if the two tokenizers make different tokens of the text."""
    if torch.equal(before, after):
        return
    place = int((before != after).flatten().int().argmax())
    raise BadInput(
        f"{second}: its tokenizer makes other tokens of the text than {first}'s, from token {place} on; "
        "vectors of different tokens cannot be compared. Compare models with the same tokenizer"
    )


def check_out(folder: Path) -> None:
    """BadInput if there is a file in the folder's place."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--out {folder}: is a file; name a folder, or one that does not exist yet")


def write(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write condensation.json, condensation.html and the pictures into `folder`; returns the files.

    See `check_out`.
    """
    from edgedisp.report import condensation_page  # brings matplotlib and jinja2

    check_out(folder)
    both = [{name: part for name, part in found.items() if name not in ("compared", "change")}]
    if "compared" in found:
        both.append({**found["compared"], "change": found["change"]})
    measured = dict(zip(_short([one["model"] for one in both]), both))
    return condensation_page.write(measured, found, folder)


def _short(names: list[str]) -> list[str]:
    """The shortest endings of the paths that tell the models apart; equal names are numbered."""
    if len(set(names)) < len(names):
        return [f"{name} ({place})" for place, name in enumerate(names, start=1)]
    parts = [Path(name).parts for name in names]
    for depth in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-depth:]) for part in parts]
        if len(set(short)) == len(names):
            return short
    return names


HEAD = "layer  cosine  [95 % interval]  no sinks  no mean  eff. rank    MEV  kurtosis  max/median"
LEGEND = """\
cosine: mean over the pairs of tokens; no sinks: without attention sinks, as all that follows but max/median;
no mean: and without the mean vector; MEV: maximum explainable variance; max/median: of absolute values"""


def render(found: dict[str, Any]) -> str:
    """The tables as text: of each model, then what differs."""
    parts = [_model_text(found)]
    if "compared" in found:
        parts += [_model_text(found["compared"]), _change_text(found)]
    return "\n\n".join([*parts, LEGEND])


def _model_text(one: dict[str, Any]) -> str:
    lines = [f"{one['model']} ({one['runs_on']}): {one['sequences']} sequences, {one['tokens']} tokens", HEAD]
    for row in [*one["layers"], {**one["final_norm"], "layer": "norm"}]:
        low, high = row["intervals"].get("cosine_raw", (None, None))
        lines.append(
            f"{row['layer']:>5}  {row['cosine_raw']:6.3f}  {_ends(low, high):>15}"
            f"  {row['cosine_sink_excluded']:8.3f}  {row['cosine_mean_removed']:7.3f}"
            f"  {row['effective_rank']:9.1f}  {row['maximum_explainable_variance']:5.3f}"
            f"  {row['kurtosis']:8.1f}  {row['max_over_median']:10.0f}"
        )
    mean, trend = one["mean_cosine"], one["correlations"]
    return "\n".join(
        [
            *lines,
            f"mean cosine of the layers from 1 on {mean['value']:.3f} {_ends(mean['low'], mean['high'])}",
            "correlation of mean cosine with depth: "
            + ", ".join(
                f"{name.capitalize()} {part['value']:.3f} {_ends(part['low'], part['high'])}"
                for name, part in trend.items()
            ),
        ]
    )


def _ends(low: float | None, high: float | None, form: str = ".3f") -> str:
    return "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"


# figure -> heading and format, of the table of differences
COMPARED = {
    "cosine_raw": ("cosine", "+.4f"),
    "cosine_sink_excluded": ("no sinks", "+.4f"),
    "effective_rank": ("eff. rank", "+.2f"),
}


def _change_text(found: dict[str, Any]) -> str:
    """Second less first, with the paired intervals; a star where an interval excludes 0."""
    change, compared = found["change"], found["compared"]["model"]
    lines = [f"{compared} - {found['model']}, paired over sequences (*: the 95 % interval excludes 0)"]
    if change["layers"]:
        heads = "".join(f"  {heading:>27}" for heading, _ in COMPARED.values())
        lines.append(f"layer{heads}")
        for row in [*change["layers"], {**change["final_norm"], "layer": "norm"}]:
            cells = "".join(f"  {_cell(row[name], form):>27}" for name, (_, form) in COMPARED.items())
            lines.append(f"{row['layer']:>5}{cells}".rstrip())
    else:
        lines.append("the models differ in depth: layers are not compared one by one")
    whole = {"mean cosine": change["mean_cosine"], **change["correlations"]}
    lines += [f"{name}: {_cell(part, '+.4f')}".rstrip() for name, part in whole.items()]
    return "\n".join(lines)


def _cell(part: dict[str, float | None], form: str) -> str:
    value, low, high = part["difference"], part["low"], part["high"]
    if low is None or high is None:
        return f"{value:{form}}"
    return f"{value:{form}} {_ends(low, high, form)}{'*' if low > 0 or high < 0 else ' '}"
