"""Which kernels onnxruntime really runs for a bundle, and on which provider.

A graph's operators are not what runs: onnxruntime fuses some, folds others, and hands a node that a provider
lacks to another one. So one short prompt runs with the profiler on, which names operator and provider of
every kernel.

A quantized weight is worth its name only if the product reads it packed. `DequantizeLinear` before a product
unpacks it at every token; folded at load, it leaves the fp32 weight in memory. onnxruntime turns some such
pairs into `MatMulNBits` itself, which is as good. Any other fails.

Left out: which of its inner loops a kernel picks for the processor (the profiler does not say).
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto

from edgedisp.core.errors import BuildFailed
from edgedisp.graph.session import OnnxModel

NATIVE = "CPUExecutionProvider"
DEQUANTIZING = "DequantizeLinear"


def check_kernels(bundle: Path, graph: GraphProto, prompt: list[int], threads: int) -> dict[str, Any]:
    """Run a few tokens: {kernels: {operator: n}, providers: {name: n}}, counted by node.

    BuildFailed names a node that ran on another provider than the CPU's, or a weight that is dequantized
    apart from its product.
    """
    ran = _ran(bundle, prompt, threads)
    _hold_native(ran, str(bundle))
    kernels = Counter(kernel["op_name"] for kernel in ran.values())
    _hold_packed(graph, kernels, str(bundle))
    return {
        "kernels": dict(sorted(kernels.items())),
        "providers": dict(sorted(Counter(kernel["provider"] for kernel in ran.values()).items())),
    }


def _ran(bundle: Path, prompt: list[int], threads: int) -> dict[str, dict[str, str]]:
    """Node -> {op_name, provider} of the kernel that ran for it."""
    with tempfile.TemporaryDirectory() as folder:
        model = OnnxModel(bundle, threads, profile=Path(folder) / "profile")
        ids = np.array([prompt], np.int64)
        model(ids, np.ones_like(ids))
        events = json.loads(Path(model.session.end_profiling()).read_text(encoding="utf-8"))
    ending = "_kernel_time"
    return {
        event["name"].removesuffix(ending): event["args"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(ending)
    }


def _hold_native(ran: dict[str, dict[str, str]], bundle: str) -> None:
    strangers = [
        f"{name} ({kernel['provider']})" for name, kernel in ran.items() if kernel["provider"] != NATIVE
    ]
    if strangers or not ran:
        raise BuildFailed(
            f"{bundle}: {len(strangers)} nodes ran on another provider than {NATIVE}: {strangers[:5]}"
        )


def _hold_packed(graph: GraphProto, kernels: Counter[str], bundle: str) -> None:
    """Every DequantizeLinear of the graph must have become a MatMulNBits."""
    pairs = [node.name for node in graph.node if node.op_type == DEQUANTIZING]
    products = sum(node.op_type == "MatMulNBits" for node in graph.node) + len(pairs)
    if kernels[DEQUANTIZING] or (pairs and kernels["MatMulNBits"] < products):
        raise BuildFailed(
            f"{bundle}: weights are dequantized apart from their products instead of read packed by "
            f"MatMulNBits: {pairs[:5]}"
        )
