"""Accuracy level by node: activations rounded to 8 bits where tokens do not flip, fp32 where they do.

At level 4 `MatMulNBits` rounds its input to 8 bits, block by block, and multiplies in int8: twice as fast,
and in most nodes invisible. A few inputs hold values hundreds of times the rest; rounding those can change
which token comes out best (onnxruntime issue 29849). So it is measured, on calibration text, against the
same graph with every node at level 0, which computes in fp32:

1. Every node at 4. If at most `limit` of the tokens flip (another best token), that is it.
2. Else each node alone at 4, on a piece of the text: the KL divergence it adds. Flips would be too few to
   count for one node; the KL moves with them and is smooth.
3. The nodes are put back to level 0, worst first, and bisection finds how many it takes until at most `limit`
   flip. What is returned was measured with all of its nodes together.

Near ties flip under any change of arithmetic, so a limit of zero means level 0 everywhere. SmolLM2-135M on
512 to 1,024 tokens: with every node at 4, 3.0 to 4.5 % of tokens flip at 4-bit weights and 2.1 % at 8-bit,
for a KL of 0.003 nats (rounding the weights to 4 bits: 26 % and 0.23 nats against fp32). It is spread: the
head alone flips 2.1 %, gate and up 2.1 %, q, k, v 2.5 %, down 1.6 %, o 0.4 %. No few nodes are to blame, and
level 0 would cost half the speed, so the recipe's usual limit of 5 % leaves such a model at 4.

2-bit weights are computed in fp32 whatever the level says, so their nodes are left at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgedisp.core.progress import Progress, silent

Run = Callable[[bytes, int], NDArray[np.float32]]
"""(a graph that reads the bundle's weights, tokens of the text to run) -> logits [tokens, vocabulary]."""


@dataclass(frozen=True)
class Levels:
    """The nodes that stay at level 0, and what was measured."""

    exact: tuple[str, ...]
    record: dict[str, Any]


def choose_levels(
    model: onnx.ModelProto,
    run: Run,
    tokens: int,
    *,
    limit: float,
    few: int = 128,
    given: Collection[str] | None = None,
    progress: Progress = silent,
) -> Levels:
    """Decide the level of each `MatMulNBits` of `model` on `tokens` tokens, `few` of them for a node alone.

    `given`: names of the nodes at level 0, decided elsewhere; nothing is searched for then.

    The graph is not changed. The record: {limit, tokens, flips_all_4, flips_all_0, flips, kl_all_4, kl,
    nodes, nodes_at_0 [names], kl_by_node {name: KL at 4 alone}, empty where all could stay}; flips are
    shares of tokens against all nodes at 0, KL in nats per token.
    """
    names = [node.name for node in _products(model) if _field(node, "bits") > 2]
    progress(0, len(names), "accuracy level")
    exact = run(with_levels(model, ()), tokens)
    all_4 = _compare(exact, run(with_levels(model, names), tokens))
    chosen, figures, alone = set(names), all_4, {}
    if given is not None:
        chosen -= set(given)
        figures = _compare(exact, run(with_levels(model, chosen), tokens))
    elif all_4[0] > limit:
        alone = _each_alone(model, run, exact, names, few, progress)
        order = sorted(names, key=lambda name: (-alone[name], name))
        low, high = 0, len(order)  # worst nodes at level 0: too few, enough (with all of them nothing flips)
        figures, chosen = (0.0, 0.0), set()
        while high - low > 1:
            middle = (low + high) // 2
            found = _compare(exact, run(with_levels(model, order[middle:]), tokens))
            if found[0] <= limit:
                high, figures, chosen = middle, found, set(order[middle:])
            else:
                low = middle
    every = [node.name for node in _products(model)]
    at_0 = tuple(name for name in every if name not in chosen)
    progress(len(names), len(names), "accuracy level")
    return Levels(
        at_0,
        {
            "limit": limit,
            "tokens": len(exact),
            "flips_all_4": all_4[0],
            "flips_all_0": 0.0,
            "flips": figures[0],
            "kl_all_4": all_4[1],
            "kl": figures[1],
            "nodes": len(every),
            "nodes_at_0": list(at_0),
            "kl_by_node": alone,
        },
    )


def _each_alone(
    model: onnx.ModelProto,
    run: Run,
    exact: NDArray[np.float32],
    names: list[str],
    few: int,
    progress: Progress,
) -> dict[str, float]:
    found = {}
    for done, name in enumerate(names):
        progress(done, len(names), "accuracy level of each node")
        logits = run(with_levels(model, (name,)), few)
        found[name] = _compare(exact[: len(logits)], logits)[1]
    return found


def with_levels(model: onnx.ModelProto, rounding: Collection[str]) -> bytes:
    """The graph with the nodes named in `rounding` at level 4 and every other `MatMulNBits` at 0."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    wanted = set(rounding)
    for node in _products(copy):
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 4 if node.name in wanted else 0
    return bytes(copy.SerializeToString())


def levels_by_weight(model: onnx.ModelProto) -> dict[str, int]:
    """Weight, by its name before it was packed -> level of its product."""
    return {
        node.input[1].removesuffix(".blocks").rsplit(".q", 1)[0]: _field(node, "accuracy_level")
        for node in _products(model)
    }


def levels_by_node(model: onnx.ModelProto) -> dict[str, int]:
    """Name of each product -> its level."""
    return {node.name: _field(node, "accuracy_level") for node in _products(model)}


def _products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "MatMulNBits"]


def _field(node: onnx.NodeProto, name: str) -> int:
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == name)


def _compare(exact: NDArray[np.float32], logits: NDArray[np.float32]) -> tuple[float, float]:
    """(share of tokens whose best token differs, KL(exact || logits) in nats), by slices of tokens."""
    flips, total = 0, 0.0
    for start in range(0, len(exact), 64):
        p, q = (part[start : start + 64].astype(np.float64) for part in (exact, logits))
        flips += int((p.argmax(-1) != q.argmax(-1)).sum())
        p, q = (x - x.max(-1, keepdims=True) for x in (p, q))
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        total += float((np.exp(p) * (p - q)).sum())
    return flips / len(exact), max(total, 0.0) / len(exact)
