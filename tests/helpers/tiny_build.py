"""The recipe of a build that takes seconds: a tiny model, made text."""

from __future__ import annotations

from pathlib import Path

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


def write_recipe(folder: Path, base: Path | str, text: Path | str) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(base=base, text=text))
    return path
