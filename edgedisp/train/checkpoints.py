"""Checkpoints that are either whole or not there, and that know whose they are.

The Trainer writes a checkpoint as a folder of several files. Here a marker is added last: the sizes of all
files, the log so far, and what the run is made of. A checkpoint without a marker, or with a file that is
not as long as the marker says, is never resumed from; the one before it is, because older ones are removed
only after the marker of a newer one is in place. (The Trainer's own `save_total_limit` removes them before,
so it is left off.)

"What the run is made of" is hashes of the initial weights, of the tokens and of every setting that decides
the result. A checkpoint of another run is refused with the names of what differs.

Left out: fsync. A killed process loses nothing that it wrote; a machine that loses power may.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgedisp import BadInput
from edgedisp.train.settings import TrainSettings

MARKER = "edgedisp.json"
FREE = ("checkpoint_every",)  # settings that may change between a checkpoint and its resumption
HASHED_AT_ONCE = 1 << 24  # tokens, so that a mapped file of any size passes through little memory


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, the rows of log and watch up to it, and what its run is made of."""

    folder: Path
    rows: list[dict[str, Any]]
    watched: list[dict[str, Any]]
    skipped_sequences: int
    run: dict[str, Any]


def mark(folder: Path, state: dict[str, Any]) -> None:
    """Declare the checkpoint in `folder` whole: the last write, and an atomic one."""
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    unfinished = folder / f"{MARKER}.partial"
    unfinished.write_text(json.dumps({**state, "sizes": sizes}), encoding="utf-8")
    unfinished.replace(folder / MARKER)


def read(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, or None if it is not whole."""
    try:
        raw = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in raw["sizes"].items())
    except (OSError, ValueError, KeyError):
        return None
    fields = {name: raw[name] for name in ("rows", "watched", "skipped_sequences", "run")}
    return Checkpoint(folder, **fields) if whole else None


def found(folder: Path) -> list[Path]:
    """Folders of checkpoints under `folder`, whole or not, oldest first."""
    named = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(named, key=lambda path: int(path.name.split("-")[1]))


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint under `folder`."""
    return next((whole for path in reversed(found(folder)) if (whole := read(path))), None)


def last_checkpoint(folder: Path) -> Path | None:
    """Folder of the newest whole checkpoint under `folder`, or None."""
    whole = newest(folder)
    return None if whole is None else whole.folder


def keep_only(folder: Path, kept: Path | None) -> None:
    """Remove every other checkpoint, whole or not.

    The marker goes first: a folder that is half removed when the process is killed is not taken for whole.
    """
    for path in found(folder):
        if path != kept:
            (path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(path)


def run_identity(
    model: nn.Module, tokens: np.ndarray, settings: TrainSettings, **others: Any
) -> dict[str, Any]:
    """What decides the weights of a run, JSON-able; `others` are told apart by their `repr`."""
    decisive = {name: value for name, value in asdict(settings).items() if name not in FREE}
    identity = {
        "initial weights": _weights_digest(model),
        "tokens": _tokens_digest(tokens),
        **{name: repr(value) for name, value in others.items()},
        **decisive,
    }
    plain: dict[str, Any] = json.loads(json.dumps(identity))  # as it will be read back
    return plain


def check_same_run(checkpoint: Checkpoint, run: dict[str, Any]) -> None:
    """Raise BadInput if the checkpoint belongs to a run that is made of something else."""
    names = sorted({*checkpoint.run, *run})
    other = [name for name in names if checkpoint.run.get(name) != run.get(name)]
    if other:
        told = ", ".join(_difference(name, checkpoint.run.get(name), run.get(name)) for name in other)
        raise BadInput(
            f"{checkpoint.folder}: is a checkpoint of another run, which differs in {told}; "
            "train in another folder, or remove this one to start anew"
        )


def _difference(name: str, before: Any, now: Any) -> str:
    is_hash = isinstance(before, str) and len(before) == 64 and name in ("initial weights", "tokens")
    return name if is_hash else f"{name} ({before} there, {now} here)"


def _weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all parameters, frozen and quantized ones included."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)};".encode())
        raw = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def _tokens_digest(tokens: np.ndarray) -> str:
    digest = hashlib.sha256(f"{tokens.dtype} {tokens.shape};".encode())
    rows = max(1, HASHED_AT_ONCE // tokens.shape[1])
    for start in range(0, len(tokens), rows):
        digest.update(np.ascontiguousarray(tokens[start : start + rows]).data)
    return digest.hexdigest()
