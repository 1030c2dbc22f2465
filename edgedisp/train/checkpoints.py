"""Checkpoints that are either whole or not there, and that know whose they are.

The Trainer writes a checkpoint as a folder of several files. Here a marker is added last: the sizes of all
files, the log so far, and what the run is made of. A checkpoint without a marker, or with a file that is
not as long as the marker says, is never resumed from; the one before it is, because older ones are removed
only after the marker of a newer one is in place. (The Trainer's own `save_total_limit` removes them before,
so it is left off.)

"What the run is made of" is hashes of the initial weights and of the tokens, the configurations of the model
and of its adapters, and every setting that decides the result. A checkpoint of another run is refused with
the names of what differs.

A folder is claimed before the Trainer writes into it, and the claim is the last thing that goes when it is
removed. So what a killed process leaves behind is known for ours, and a `checkpoint-500` that another program
wrote is never removed, or written into when this run comes to step 500.

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

from edgedisp.core.errors import BadInput
from edgedisp.train.settings import TrainSettings

MARKER = "edgedisp.json"
CLAIM = f"{MARKER}.partial"
NAMED = "checkpoint-"  # the Trainer's own way to call them
FREE = ("checkpoint_every",)  # settings that may change between a checkpoint and its resumption
HASHED_AT_ONCE = 1 << 24  # tokens, so that a mapped file of any size passes through little memory
# Entries of configurations that say where something came from, or change as it is saved or trained.
PROVENANCE = {"_name_or_path", "base_model_name_or_path", "revision", "transformers_version", "peft_version"}
PROVENANCE |= {"auto_mapping", "architectures", "dtype", "use_cache"}


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, the rows of log and watch up to it, and what its run is made of."""

    folder: Path
    rows: list[dict[str, Any]]
    watched: list[dict[str, Any]]
    skipped_sequences: int
    run: dict[str, Any]


def folder_of(folder: Path, step: int) -> Path:
    """Where the Trainer writes the checkpoint of a step."""
    return folder / f"{NAMED}{step}"


def begin(folder: Path) -> None:
    """Claim the folder of a checkpoint, before anything is written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CLAIM).touch()


def mark(folder: Path, state: dict[str, Any]) -> None:
    """Declare the checkpoint in `folder` whole: the last write, and an atomic one."""
    claim = folder / CLAIM
    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != claim
    }
    claim.write_text(json.dumps({**state, "sizes": sizes}), encoding="utf-8")
    claim.replace(folder / MARKER)


def read(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, or None if it is not whole."""
    try:
        raw = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if not _is_marker(raw):
            return None
        whole = all((folder / name).stat().st_size == size for name, size in raw["sizes"].items())
    except (OSError, ValueError):
        return None
    fields = {name: raw[name] for name in ("rows", "watched", "skipped_sequences", "run")}
    return Checkpoint(folder, **fields) if whole else None


def _is_marker(raw: Any) -> bool:
    """Whether a marker's content, which may be damaged, has the form that `mark` gives it."""
    if not isinstance(raw, dict):
        return False
    logs = [raw.get("rows"), raw.get("watched")]
    return (
        all(isinstance(log, list) and all(isinstance(row, dict) for row in log) for log in logs)
        and isinstance(raw.get("skipped_sequences"), int)
        and isinstance(raw.get("run"), dict)
        and isinstance(raw.get("sizes"), dict)
        and bool(raw["sizes"])
    )


def found(folder: Path) -> list[Path]:
    """What has the name of a checkpoint under `folder`, whole or not, oldest first."""
    steps = {path: path.name.removeprefix(NAMED) for path in folder.glob(f"{NAMED}*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda p: int(steps[p]))


def check_own(folder: Path) -> None:
    """Raise BadInput if there is a checkpoint under `folder` that another program wrote."""
    foreign = [path for path in found(folder) if not _is_own(path)]
    if foreign:
        raise BadInput(
            f"{foreign[0]}: is no checkpoint of edgedisp, so it can neither be resumed from nor overwritten; "
            "move it, or keep this run's checkpoints in a folder of their own"
        )


def _is_own(path: Path) -> bool:
    """Whether `begin` or `mark` was here. An empty folder may be one whose claim was still to come."""
    if path.is_symlink() or not path.is_dir():
        return False
    return not any(path.iterdir()) or any((path / name).is_file() for name in (MARKER, CLAIM))


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint under `folder`."""
    return next((whole for path in reversed(found(folder)) if (whole := read(path))), None)


def last_checkpoint(folder: Path) -> Path | None:
    """Folder of the newest whole checkpoint under `folder`, or None."""
    whole = newest(folder)
    return None if whole is None else whole.folder


def keep_only(folder: Path, kept: Path | None) -> None:
    """Remove every other checkpoint of ours, whole or not."""
    for path in found(folder):
        if path != kept and _is_own(path):
            _remove(path)


def _remove(folder: Path) -> None:
    """The marker goes first, the claim last: half removed, it is taken neither for whole nor for foreign."""
    begin(folder)
    (folder / MARKER).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name == CLAIM:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.rmtree(folder)


def run_identity(
    model: nn.Module, tokens: np.ndarray, settings: TrainSettings, **others: Any
) -> dict[str, Any]:
    """What decides the weights of a run, JSON-able; `others` are told apart by their `repr`."""
    decisive = {name: value for name, value in asdict(settings).items() if name not in FREE}
    identity = {
        "initial weights": _weights_digest(model),
        "tokens": _tokens_digest(tokens),
        **_configured(model),
        **{name: repr(value) for name, value in others.items()},
        **decisive,
    }
    # As it will be read back.
    plain: dict[str, Any] = json.loads(json.dumps(identity, default=_alike_in_every_process))
    return plain


def _configured(model: Any) -> dict[str, Any]:
    """What a model computes with beside its weights: its configuration and its adapters', entry by entry."""
    config: Any = getattr(model, "config", None)
    adapters = getattr(model, "peft_config", {})
    attention = {"attention": getattr(config, "_attn_implementation", None)}
    return {
        **_entries("model", (config.to_dict() if hasattr(config, "to_dict") else {}) | attention),
        **_entries("adapter", {name: adapter.to_dict() for name, adapter in adapters.items()}),
    }


def _entries(name: str, value: Any) -> dict[str, Any]:
    """A nested mapping as one of dotted names.

    What is off or not set is left out: an option that a later release brings, and that is off unless asked
    for, makes no other run of this one.
    """
    if isinstance(value, dict):
        inner = [_entries(f"{name}.{key}", one) for key, one in value.items() if key not in PROVENANCE]
        return {key: one for entries in inner for key, one in entries.items()}
    return {} if value is None or value is False else {name: value}


def _alike_in_every_process(value: Any) -> Any:
    """A set's order depends on the process, and so may an object's words, by an address in them."""
    return sorted(value, key=str) if isinstance(value, set) else type(value).__name__


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
    """SHA-256 over all that a state dict holds, and over what is trained and what is tied.

    Of weights that bitsandbytes holds, the state dict alone has the scales.
    """
    digest = hashlib.sha256()
    state = {
        name: value for name, value in model.state_dict(keep_vars=True).items() if torch.is_tensor(value)
    }
    names: dict[int, str] = {}
    for name, value in state.items():
        same = names.setdefault(id(value), name)
        told = (name, same, value.dtype, tuple(value.shape), value.requires_grad)
        digest.update(f"{told};".encode())
        if same == name:
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
    return digest.hexdigest()


def _tokens_digest(tokens: np.ndarray) -> str:
    digest = hashlib.sha256(f"{tokens.dtype} {tokens.shape};".encode())
    rows = max(1, HASHED_AT_ONCE // tokens.shape[1])
    for start in range(0, len(tokens), rows):
        digest.update(np.ascontiguousarray(tokens[start : start + rows]).data)
    return digest.hexdigest()
