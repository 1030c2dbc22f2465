"""The commands over recipes and runs: build, plan, pilot, recipes, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from edgedisp.cli.app import (
    JsonOption,
    OutOption,
    RecipeArgument,
    SetOption,
    SmokeOption,
    app,
    load_recipe,
    width,
)
from edgedisp.core import distributed as processes
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.paths import data_folder


@app.command()
def build(
    recipe: RecipeArgument,
    set_: SetOption = None,
    smoke: SmokeOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train, export, quantize, check, score and time a recipe's model; end with a report.

    Several processes train together: torchrun --nproc_per_node 2 -m edgedisp build RECIPE
    """
    from edgedisp.core.progress import Screen
    from edgedisp.pipeline import build as build_run
    from edgedisp.pipeline import run_folder
    from edgedisp.plan import check_before_start, check_processes, slow_products, threads_for

    loaded = load_recipe(recipe, set_, smoke)
    run = run_folder(loaded, out)
    here = processes.place()
    check_processes(loaded, here.count)
    if not here.leads:
        from edgedisp.follow import follow

        follow(loaded, run, threads_for(loaded))
        return
    check_before_start(loaded, run)
    if warning := slow_products(loaded):
        typer.echo(f"warning: {warning}", err=True)
    with Screen(f"{loaded.name} -> {run}") as screen:
        walked = build_run(loaded, run, threads_for(loaded), screen)
        from edgedisp.run_report import publish

        summary = publish(loaded, walked, run)
    _show(summary, run, as_json)
    _end_if_missing(summary)


def _show(summary: dict[str, Any], run: Path, as_json: bool) -> None:
    from edgedisp.report import assignment_text, render_arms, render_text, table, verdict

    if as_json:
        shown = {"run": str(run), "report": str(run / "report.html"), "verdict": verdict(summary)}
        typer.echo(json.dumps(shown, ensure_ascii=False))
        return
    typer.echo(render_text(table(summary), width()))
    if chosen := assignment_text(summary):
        typer.echo(f"\n{chosen}")
    typer.echo("")
    if others := render_arms(summary, width()):
        typer.echo(f"{others}\n")
    typer.echo(verdict(summary)["sentence"])
    typer.echo("")
    typer.echo(f"report: {run / 'report.html'}")


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    smoke: SmokeOption = False,
    out: OutOption = None,
    probe: Annotated[bool, typer.Option(help="Open the base model and time a few training steps.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Say what a build would do: stages, which are done, steps, time, memory and disk."""
    from edgedisp.core.progress import Screen
    from edgedisp.pipeline import run_folder
    from edgedisp.plan import make_plan
    from edgedisp.plan_text import render

    loaded = load_recipe(recipe, set_, smoke)
    with Screen("plan") as screen:
        planned = make_plan(loaded, run_folder(loaded, out), probe=probe, observer=screen)
    typer.echo(json.dumps(planned) if as_json else render(planned))


@app.command()
def pilot(
    recipe: RecipeArgument,
    weights: Annotated[
        str, typer.Option(metavar="W,W,...", help="Weights to try, each with all layers and variants.")
    ] = "0.03,0.1,0.3,1,3",
    tokens: Annotated[str, typer.Option(metavar="COUNT", help="Training tokens of the last rung.")] = "20k",
    layers: Annotated[
        str | None, typer.Option(metavar="L,L,...", help="Such as all,last_half; default: the recipe's.")
    ] = None,
    variants: Annotated[
        str | None, typer.Option(metavar="V,V,...", help="Such as angular,cosine; default: the recipe's.")
    ] = None,
    halvings: Annotated[
        int | None, typer.Option(min=0, help="How often the better half goes on; default: 2 where possible.")
    ] = None,
    set_: SetOption = None,
    smoke: SmokeOption = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Its folder; default runs/<recipe>-pilot-<hash>.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find out which dispersion settings do anything, on few tokens, before a build spends hours."""
    from edgedisp import pilot as piloting
    from edgedisp.core.progress import Screen
    from edgedisp.pilot import show

    loaded = load_recipe(recipe, set_, smoke)
    planned = piloting.plan(
        loaded, weights=weights, tokens=tokens, layers=layers, variants=variants, halvings=halvings
    )
    folder = piloting.pilot_folder(planned, out)
    with Screen(f"pilot of {loaded.name}") as screen:
        left = piloting.estimate(planned, folder, screen.progress)
    typer.echo(show.announce(left, folder), err=True)
    with Screen(f"{loaded.name} -> {folder}") as screen:
        found = piloting.run(planned, folder, screen)
    typer.echo(json.dumps(found, ensure_ascii=False) if as_json else show.render(found))
    if not as_json:
        typer.echo(f"\npicture: {folder / 'pilot.png'}")


@app.command()
def recipes() -> None:
    """List the packaged recipes."""
    for path in sorted(data_folder("recipes").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").strip()
        typer.echo(f"{path.stem:24} {first}")


@app.command()
def compare(
    subjects: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders or report.json files; or two models or bundles."),
    ],
    tasks: Annotated[
        str | None, typer.Option(metavar="T,T,...", help="For two models: tasks or sets, such as small.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For two models: documents for the held-out tasks.")
    ] = None,
    tasks_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="For two models: your own lm-eval tasks.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="For two models: items of each task; default 200.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=8, help="For two models: tokens of a held-out window; default 256.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="For two models: the folder of the report."),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the comparison as a page.")] = None,
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Print the before/after table of runs, joined item by item, or of two models scored here."""
    from edgedisp.comparison import is_run

    _check_page(html)
    runs = [path for path in subjects if is_run(path)]
    if not runs and len(subjects) == 2:
        names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        _compare_models(subjects, names, text, tasks_path, limit, context, out, html, as_json, markdown)
        return
    if len(runs) < len(subjects):
        other = next(path for path in subjects if not is_run(path))
        raise BadInput(
            f"{other}: holds no report.json, so it is no finished run; compare takes runs, or exactly two "
            "model folders or bundles"
        )
    of_models = {
        "--tasks": tasks, "--text": text, "--tasks-path": tasks_path, "--limit": limit, "--context": context,
        "--out": out,
    }  # fmt: skip
    if given := [name for name, value in of_models.items() if value]:
        raise BadInput(f"{given[0]}: is for two models; runs were scored when they were built")
    _compare_runs(runs, html, as_json, markdown)


def _compare_runs(runs: list[Path], html: Path | None, as_json: bool, markdown: bool) -> None:
    from edgedisp.report import compare as compare_runs
    from edgedisp.report import render_arms, render_markdown, render_text, verdict
    from edgedisp.summary import load

    summaries = [load(run) for run in runs]
    compared = compare_runs(summaries)
    joint = None
    if len(runs) > 1:
        from edgedisp.comparison.runs import joined

        joint = joined(runs)
    if html is not None:
        _write_page(joint or summaries[0], html)
    if as_json:
        found = {"table": compared.as_json(), "verdicts": [verdict(one) for one in summaries]}
        if joint is not None:
            found["joint"] = {key: joint[key] for key in ("arms", "comparison", "means", "apart")}
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    typer.echo(render_markdown(compared) if markdown else render_text(compared, width()))
    for summary in summaries:
        typer.echo(f"\n{summary['name']}: {verdict(summary)['sentence']}")
        if joint is None and (others := render_arms(summary, width())):
            typer.echo(f"\n{others}")
    if joint is not None:
        typer.echo(f"\n{render_arms(joint, width())}")
        for reason in joint["apart"]:
            typer.echo(f"not paired: {reason}")


def _compare_models(
    subjects: list[Path],
    names: list[str],
    text: Path | None,
    tasks_path: Path | None,
    limit: int | None,
    context: int | None,
    out: Path | None,
    html: Path | None,
    as_json: bool,
    markdown: bool,
) -> None:
    from edgedisp.comparison.models import folder_for, scored_pair
    from edgedisp.core.progress import Screen
    from edgedisp.report import render_markdown, table, verdict

    first, second = subjects
    folder = out or folder_for(first, second, names, text)
    with Screen(f"{first} and {second} -> {folder}") as screen:
        summary = scored_pair(
            first,
            second,
            names,
            folder,
            text=text,
            tasks_path=tasks_path,
            limit=limit or 200,
            context=context or 256,
            progress=screen.progress,
        )
    if html is not None:
        _write_page(summary, html)
    if markdown:
        typer.echo(render_markdown(table(summary)))
        typer.echo(verdict(summary)["sentence"])
    else:
        _show(summary, folder, as_json)
    _end_if_missing(summary)


def _write_page(summary: dict[str, Any], path: Path) -> None:
    """The report as one page, with nothing beside it."""
    from edgedisp.report import single_page

    path.write_text(single_page(summary), encoding="utf-8")
    typer.echo(f"page: {path}", err=True)


def _check_page(path: Path | None) -> None:
    """Before anything is scored: whether a page can be written there."""
    if path is not None and not path.parent.is_dir():
        raise BadInput(f"--html {path}: there is no folder {path.parent}")
    if path is not None and path.is_dir():
        raise BadInput(f"--html {path}: is a folder; name a file, such as {path / 'compared.html'}")


def _end_if_missing(summary: dict[str, Any]) -> None:
    """Exit code 1 where a task could not be scored: all else is done, and told."""
    if missing := summary["missing_tasks"]:
        raise BuildFailed(
            f"the report is written, but {', '.join(missing)} could not be scored: "
            f"{'; '.join(missing.values())}. The same command tries again and keeps the rest"
        )
