"""The recipe of a build that takes seconds: a tiny model, made text; and how a command ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edgedisp import data

RECIPE = """\
name: tiny
seed: 1
model: {{base: {base}, architecture: llama}}
data:
  train: [{{source: {text}}}]
  heldout: 20%
  context: 64
train: {{tokens: 2k, lr: 1e-3, batch: 4, checkpoint_every: 2, dispersion: {{weight: 0.1, tokens: 16}}}}
verify: {{tokens: 64, int8_top1: 0, int8_kl: 1, int4_top1: 0, int4_kl: 5}}
evaluate: {{limit: 6, perplexity_tokens: 500, bootstrap: 200}}
targets: [phone-arm64]
latency: {{prompt: 8, generate: 4, repetitions: 2, threads: 1}}
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended, with what it printed."""

    code: int
    out: str
    err: str

    @property
    def stages(self) -> set[str]:
        """The stages that a build ran."""
        return {line.split("] ")[1].split(":")[0] for line in self.err.splitlines() if ": done in" in line}


Command = Callable[..., Ended]
"""The command line in this process: `edgedisp("build", ...)`."""


class Built(NamedTuple):
    """A recipe, its run folder, and how the build ended."""

    recipe: Path
    run: Path
    ended: Ended


def write_recipe(folder: Path, base: Path | str, text: Path | str) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(base=base, text=text))
    return path


def write_documents(path: Path, count: int = 120, seed: int = 3) -> Path:
    """JSONL of made documents."""
    documents = data.synthetic_documents(count, seed=seed)
    path.write_text("\n".join(json.dumps({"text": document.text}) for document in documents))
    return path
