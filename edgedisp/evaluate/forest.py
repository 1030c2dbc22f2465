"""Many token sequences in one forward pass, with each shared beginning computed once.

The choices of a question share its context, the questions of a few-shot task its examples. Sorted, sequences
that begin alike lie side by side and form trees: a node is a token, its parent the token before it. A node
attends to its ancestors and itself and stands at its depth, so its logits are those of its sequence alone;
there is no padding. Trees side by side make a forest, up to a budget of nodes, as attention looks at all
pairs of nodes before most of them are masked.

Nodes are in depth-first order, so the descendants of a node are those that follow it, up to its `end`; and
all that a model needs to know are three numbers for each node: its token, its depth, its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Row = tuple[int, ...]


@dataclass(frozen=True)
class Forest:
    """ids, depths, ends: int64 [nodes]. paths: sequence -> its nodes, from the first token to the last.

    Node i sees node j where j <= i < ends[j].
    """

    ids: NDArray[np.int64]
    depths: NDArray[np.int64]
    ends: NDArray[np.int64]
    paths: dict[Row, list[int]]


def plant(rows: Sequence[Row]) -> Forest:
    """The forest of some sequences, none empty."""
    ids: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    paths: dict[Row, list[int]] = {}
    path: list[int] = []
    before: Row = ()
    for row in sorted(rows):
        shared = common(before, row)
        for node in path[shared:]:
            ends[node] = len(ids)
        path = path[:shared]
        for depth, token in enumerate(row[shared:], shared):
            path.append(len(ids))
            ids.append(token)
            depths.append(depth)
            ends.append(0)
        paths[row], before = list(path), row
    for node in path:
        ends[node] = len(ids)
    return Forest(np.array(ids), np.array(depths), np.array(ends), paths)


def parted(wanted: Mapping[Row, int], most_nodes: int, most_wanted: int) -> Iterator[dict[Row, int]]:
    """Sequences in sorted order, parted so that each part's forest stays within both limits (or is one row).

    `wanted`: sequence -> how many of its nodes' logits are asked for.
    """
    part: dict[Row, int] = {}
    nodes = asked = 0
    before: Row = ()
    for row, count in sorted(wanted.items()):
        new = len(row) - common(before, row)
        if part and (nodes + new > most_nodes or asked + count > most_wanted):
            yield part
            part, nodes, asked, new = {}, 0, 0, len(row)
        part[row], before = count, row
        nodes, asked = nodes + new, asked + count
    if part:
        yield part


def common(first: Row, second: Row) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    shared = 0
    for left, right in zip(first, second):
        if left != right:
            break
        shared += 1
    return shared
