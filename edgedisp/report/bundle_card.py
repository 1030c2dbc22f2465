"""The README.md of a bundle: what it is, where it comes from, how each runtime opens it, what was measured.

What a bundle is stands in its manifest; what was measured stands in the summary of the build that packed it.
`edgedisp export` alone has no summary, and the card then says that nothing was measured.

The front matter claims no licence: a derived model's follows from its base and its text. What the base says
of itself is told in the text, and its licence files lie beside the card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgedisp.report.before_after import table
from edgedisp.report.card import front_matter, limits, training, what
from edgedisp.report.claims import verdict
from edgedisp.report.reading import Summary, at, branch, number, run_title
from edgedisp.report.rendering import escape_markdown, fenced, grid_markdown, render_markdown
from edgedisp.report.wording import megabytes

NO_LICENCE = "Licence of the base not found: look it up before you distribute."
SHELLS = {"transformers.js": "js"}  # all other runtimes are opened from Python

Manifest = Mapping[str, Any]


def bundle_card(manifest: Manifest, name: str, summary: Summary | None = None) -> str:
    """Markdown with YAML front matter for the bundle `name` (a folder's name).

    manifest: manifest.json; summary: of the build that packed it, or None where nothing was measured.
    """
    base = str(at(manifest, "base", "base") or "")
    arm = str(at(manifest, "provenance", "arm") or "")
    built = summary or {}
    title = (
        f"{escape_markdown(run_title(built))}, {escape_markdown(arm)} arm"
        if summary
        else escape_markdown(name)
    )
    precision = str(at(manifest, "precision") or "")
    blocks = [
        front_matter(base, arm, built, library="transformers.js" if _web_alone(manifest) else "onnx"),
        f"# {title}, for {escape_markdown(str(at(manifest, 'target')))}",
        what(base, arm, built) if summary else _plain_what(base, manifest),
        _stored(manifest),
        "## How to load it",
        *_loading(manifest),
        "## Results",
        *_results(summary, arm, precision),
        *(("## Training", training(summary, arm, arm)) if summary else ()),
        "## Licence",
        _licence(manifest, base),
        "## Limits",
        limits(built)
        if summary
        else "- Nothing was measured on this bundle; it was opened and its decoding checked.",
        "## Where it comes from",
        grid_markdown(("what", "value"), _origin(manifest), (0, 1)),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _web_alone(manifest: Manifest) -> bool:
    return list(branch(manifest, "layouts")) == ["transformers.js"]


def _plain_what(base: str, manifest: Manifest) -> str:
    arm = at(manifest, "provenance", "arm")
    made = f"the {escape_markdown(str(arm))} arm of a build on top of " if arm else ""
    return f"An ONNX bundle of {made}{escape_markdown(base) or 'a model folder whose base is not recorded'}."


def _stored(manifest: Manifest) -> str:
    """One paragraph: precision, grid, size, context, threads."""
    grid, size = branch(manifest, "grid"), number(at(manifest, "size_bytes"))
    weights = "Weights in fp32"
    if grid:
        kind = "symmetric" if grid.get("symmetric") else "asymmetric"
        weights = (
            f"Weights at {grid.get('bits')} bits ({kind}, groups of {grid.get('group')}, method "
            f"{grid.get('method')}), embedding and head at {grid.get('head_bits')}; accuracy level "
            f"{grid.get('accuracy_level')} of MatMulNBits"
        )
    return (
        f"{weights}. {megabytes(size)} MB in all, each weight stored once; context of "
        f"{at(manifest, 'context')} tokens; {at(manifest, 'threads')} threads. `manifest.json` lists every "
        "file with its SHA-256."
    )


def _loading(manifest: Manifest) -> list[str]:
    blocks = [
        "`folder` stands for this folder, `parent` and `name` for the one that holds it and its name there, "
        "`text` for yours."
    ]
    for layout, entry in branch(manifest, "layouts").items():
        files = f"`{at(entry, 'graph')}`, weights in `{at(entry, 'weights')}`"
        code = fenced(str(at(entry, "load") or ""), SHELLS.get(layout, "python"))
        blocks += [f"### {layout}", f"{files}.", code]
    return blocks


def _results(summary: Summary | None, arm: str, precision: str) -> list[str]:
    """The verdict's sentence and the table's row at the precision that ships."""
    if summary is None:
        return ["Nothing was measured: this bundle was exported on its own. `edgedisp build` measures."]
    shown = table(summary)
    if arm not in shown.arms:
        shown = table(summary, every_arm=True)
    rows = tuple(row for row in shown.rows if row.precision == precision)
    told = escape_markdown(verdict(summary)["sentence"])
    return [told, render_markdown(replace(shown, rows=rows)).rstrip()]


def _licence(manifest: Manifest, base: str) -> str:
    found = branch(manifest, "base")
    name = found.get("license_name") or found.get("license")
    listed = found.get("files")
    files = [f"`{escape_markdown(str(file))}`" for file in listed] if isinstance(listed, list) else []
    said = []
    if name:
        link = f" ({escape_markdown(str(found['license_link']))})" if found.get("license_link") else ""
        place = escape_markdown(str(found.get("found_in")))
        said.append(f"The base model's licence: {escape_markdown(str(name))}{link}, as it says in {place}.")
    if files:
        said.append(f"Its licence texts are in this folder: {', '.join(files)}.")
    if not said:
        said.append(NO_LICENCE)
    return " ".join(
        [
            *said,
            f"This model is derived from {escape_markdown(base) or 'its base model'}, whose terms apply to "
            "it. The training text, if there was any, has a licence of its own.",
        ]
    )


def _origin(manifest: Manifest) -> list[tuple[str, str]]:
    found = branch(manifest, "provenance")
    recipe = branch(found, "recipe")
    rows = [
        ("base", str(at(manifest, "base", "base") or "not recorded")),
        (
            "recipe",
            f"{recipe.get('name')} ({recipe.get('hash8')})" if recipe else "none: exported on its own",
        ),
        ("seed", str(found.get("seed"))),
        ("tokens file, SHA-256", str(found.get("data_sha256"))),
        ("trained weights, SHA-256", str(found.get("weights_sha256"))),
        ("edgedisp", f"{found.get('edgedisp')}, commit {found.get('git_commit')}"),
        *((name, str(version)) for name, version in branch(found, "versions").items()),
    ]
    return [(key, value) for key, value in rows if value not in ("None", "")]
