"""A plan as text for people: stages with their times, sizes, what the scores will be able to show."""

from __future__ import annotations

from typing import Any

from edgedisp.core.progress import clock


def render(planned: dict[str, Any]) -> str:
    """The plan as text for people."""
    lines = [f"{planned['recipe']} -> {planned['run']}"]
    size = f"{planned['steps']} optimizer steps an arm, {planned['tokens']:,} tokens"
    lines.append(f"{size}, {planned['threads']} threads")
    if planned["warning"]:
        lines.append(f"warning: {planned['warning']}")
    lines.append("")
    for stage in planned["stages"]:
        mark, about = ("done", "") if stage["done"] else ("to do", "about ")
        took = "" if stage["seconds"] is None else about + clock(stage["seconds"])
        lines.append(f"  {mark:6} {stage['name']:28} {took}")
    lines += ["", *_size_lines(planned), "", *_detectable_lines(planned["detectable"])]
    found = planned["estimate"]
    if found is not None:
        lines += [
            "",
            f"left: about {clock(found['seconds_left'])} ({found['step_s']:.2f} s a step, probed)",
            f"memory: about {found['peak_memory_bytes'] / 1e9:.1f} GB at the peak, "
            f"{found['memory_bytes'] / 1e9:.1f} GB there",
            f"disk: about {found['disk_bytes'] / 1e9:.1f} GB, {found['disk_free_bytes'] / 1e9:.1f} GB free",
        ]
        if found["peak_memory_bytes"] > found["memory_bytes"]:
            lines.append(
                "does not fit in memory: a smaller train.batch, train.gradient_checkpointing, or an adapter"
            )
        if found["disk_bytes"] > found["disk_free_bytes"]:
            lines.append("does not fit on the disk: choose another --out")
    return "\n".join(lines)


# What `size_account` calls a component, in the order of the table, and how it is called there.
COMPONENTS = {
    "embedding": "embedding",
    "attention": "attention",
    "mlp": "mlp",
    "head": "head",
    "norm": "norms",
    "positions": "positions",
    "other": "other",
}


def _size_lines(planned: dict[str, Any]) -> list[str]:
    """A table of megabytes: a row for each component, a column for each precision; then the KV cache."""
    sizes = planned["sizes"]
    if sizes is None:
        return [f"sizes: not known: {planned['sizes_unknown']}"]
    precisions = sizes["precisions"]

    decimals = 1 if min(one["size_bytes"] for one in precisions.values()) > 1e7 else 3

    def row(name: str, found: list[int]) -> str:
        return f"  {name:22}" + "".join(f"{size / 1e6:9.{decimals}f}" for size in found)

    lines = [f"{'weights, MB (2 %)':24}" + "".join(f"{name:>9}" for name in precisions)]
    for component, name in COMPONENTS.items():
        found = [one["components"].get(component, 0) for one in precisions.values()]
        named = "embedding = head" if component == "embedding" and sizes["tied"] else name
        if max(found) >= 0.5 * 10 ** (6 - decimals):  # what does not show as zero
            lines.append(row(named, found))
    rest = [one["size_bytes"] - sum(one["components"].values()) for one in precisions.values()]
    lines.append(row("graph", rest))
    lines.append(row("file", [one["size_bytes"] for one in precisions.values()]))
    for target, cache in sizes["kv_cache"].items():
        size = f"{cache['size_bytes'] / 1e6:.{decimals}f} MB"
        lines.append(f"KV cache of {cache['positions']:,} positions ({target}): {size}")
    return lines


def _detectable_lines(found: dict[str, Any]) -> list[str]:
    """`with 500 items a task and 1 seed, a task shows differences of 3.1 points or more; ...`"""
    seeds = f"{found['seeds']} seed" + ("s" if found["seeds"] > 1 else "")
    differing = f"{100 * found['differing']:.0f} %"
    lines = [
        f"what this can see: with {found['items']:,} items a task shows differences of {found['points']:.1f} "
        f"points or more, 4 times",
        f"  out of 5; the smallest published gain, {found['published_points']} points, takes "
        f"{found['items_for_published']:,} items over all tasks (evaluate.limit)",
        f"  ({seeds}; assumed: the arms answer {differing} of the items differently; "
        "the report tells what was measured)",
    ]
    nats = ", ".join(f"{size:.2g} at {name}" for name, size in found["nats"].items())
    lines.append(
        f"  held-out loss shows {nats} in nats per token, if there are {found['items']:,} documents for it"
    )
    if found["seeds"] == 1:
        lines.append("  one seed cannot tell a gain from the luck of training: seeds: 3 can")
    return lines
