"""The same bundle under two kinds of kernels: how far apart are the next-token distributions?

Logits are computed by the runner (`--logits`), in a process of its own for each kind, and compared here.
Weights and token ids are the same, so what differs is arithmetic: mostly how activations are rounded to 8
bits for the integer products of accuracy level 4. Held against the same weights multiplied exactly (accuracy
level 0), that tells which kernels lose more.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgedisp.bench.graph_facts import needed_files, open_graph
from edgedisp.core.errors import BadInput, BuildFailed

Logits = NDArray[np.float64]
EXACT = 0  # accuracy levels of MatMulNBits that leave activations as they are: 0 (default) and 1
TAIL_CHARS = 600


def logits(
    command: Sequence[str],
    bundle: Path,
    ids: Sequence[int],
    scratch: Path,
    *,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    timeout_s: float,
) -> Logits:
    """Logits [tokens, vocab] that the runner started by `command` gives for `ids`.

    Raises BadInput where it refuses the bundle, BuildFailed where it fails or takes longer than `timeout_s`.
    """
    asked, out = scratch / "ids.json", scratch / "logits.npy"
    asked.write_text(json.dumps(list(ids)), encoding="utf-8")
    out.unlink(missing_ok=True)
    words = [*command, str(bundle), "--logits", str(asked), "--out", str(out), *options]
    try:
        done = subprocess.run(words, capture_output=True, env=environment, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise BuildFailed(f"{bundle}: no logits within {timeout_s:g} s") from None
    if done.returncode or not out.is_file():
        said = done.stderr.decode("utf-8", "replace").strip()[-TAIL_CHARS:]
        kind = BadInput if done.returncode == 2 else BuildFailed
        raise kind(f"{bundle}: computing logits ended with code {done.returncode}: {said or 'nothing said'}")
    return np.load(out, allow_pickle=False).astype(np.float64)


def exact_copy(bundle: Path, out: Path) -> bool:
    """Write `bundle` into `out` with its products computed exactly; False where they are so already."""
    import onnx

    graph = open_graph(bundle)
    rounding = [
        attribute
        for node in graph.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level" and attribute.i not in (EXACT, 1)
    ]
    if not rounding:
        return False
    for attribute in rounding:
        attribute.i = EXACT
    for name, path in needed_files(bundle).items():
        place = out / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if name == "model.onnx":
            onnx.save(graph, str(place))
        else:
            shutil.copyfile(path, place)
    return True


def divergence(reference: Logits, other: Logits) -> dict[str, float]:
    """{mean_kl (reference || other, nats), top1_agreement} over positions; logits [tokens, vocab]."""
    p, q = log_softmax(reference), log_softmax(other)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    same = reference.argmax(axis=1) == other.argmax(axis=1)
    return {"mean_kl": max(0.0, float(kl.mean())), "top1_agreement": float(same.mean())}


def perplexity(found: Logits, ids: Sequence[int]) -> float:
    """exp of the mean loss of each id but the first, given those before it."""
    after = log_softmax(found)[:-1]
    return float(np.exp(-after[np.arange(len(after)), np.asarray(ids[1:])].mean()))


def log_softmax(values: Logits) -> Logits:
    """Log-probabilities along the last axis."""
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
