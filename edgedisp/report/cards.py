"""The README.md of a model folder and of a bundle, in the shape that model hubs expect.

The front matter holds only what is known for certain: a base model is named only when it is a hub id, and no
licence is claimed, because a derived model's licence follows from its base and its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgedisp.core.results import BASELINE
from edgedisp.core.run import Run
from edgedisp.report.layout import fill_markdown
from edgedisp.report.results_table import table, table_markdown
from edgedisp.report.sections import sources_text, technique_text
from edgedisp.report.verdict import verdict


def model_card(run: Run, name: str) -> str:
    """The card of one training's model folder: the arm `name`, or the folder of another seed's training."""
    replica = run.replicas.get(name)
    arm, seed = (replica.arm, f", seed {replica.seed}") if replica else (name, "")
    about = _about(run, arm, name) | {"title": f"{run.title}, {arm} arm{seed}"}
    return fill_markdown("model_card.md.j2", **about, results=table_markdown(table(run)))


def bundle_card(manifest: Mapping[str, Any], name: str, run: Run | None = None) -> str:
    """The card of the bundle `name` (a folder's name) from its manifest.json, and the run that packed it.

    Without a run, as `edgedisp export` makes it, the card says that nothing was measured.
    """
    base, layouts = manifest.get("base") or {}, manifest.get("layouts") or {}
    arm = str((manifest.get("provenance") or {}).get("arm") or "")
    content: dict[str, Any] = {"run": None, "base": str(base.get("base") or ""), "arm": arm, "title": name}
    if run is not None:
        whole = table(run, all_arms=arm not in table(run).arms)
        rows = tuple(row for row in whole.rows if row.precision == manifest.get("precision"))
        content = _about(run, arm, arm) | {"results": table_markdown(replace(whole, rows=rows))}
    only = next(iter(layouts)) if len(layouts) == 1 else ""
    content["library"] = only if only in ("transformers.js", "gguf") else "onnx"
    formats = dict.fromkeys("gguf" if layout == "gguf" else "onnx" for layout in layouts)
    content["tags"] = [*content.get("tags", ["edgedisp"]), *formats]
    return fill_markdown("bundle_card.md.j2", **content, manifest=manifest, layouts=layouts, licence=base)


def _about(run: Run, arm: str, name: str) -> dict[str, Any]:
    """What both cards say of a training."""
    disperses = bool(run.techniques.get(arm, {}).get("dispersion"))
    return {
        "run": run,
        "title": f"{run.title}, {arm} arm",
        "base": str(run.model.get("base") or ""),
        "arm": arm,
        "is_baseline": arm == BASELINE,
        "adds": technique_text(run, arm),
        "others": "; ".join(technique_text(run, other) for other in run.compared_arms) or "nothing",
        "disperses": disperses,
        "library": "transformers",
        "tags": ["edgedisp", *(["dispersion-loss"] if disperses else [])],
        "sentence": verdict(run).sentence,
        "training": run.trainings(arm).get(name),
        "sources": sources_text(run.corpus),
    }
