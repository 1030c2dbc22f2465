"""The commands over recipes and runs: build, plan, pilot, recipes, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from edgedisp import BuildFailed, data_folder, processes
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
    from edgedisp.console import Screen
    from edgedisp.pipeline import build as build_run
    from edgedisp.pipeline import run_folder
    from edgedisp.plan import check_before_start, check_processes, threads_for

    loaded = load_recipe(recipe, set_, smoke)
    run = run_folder(loaded, out)
    here = processes.place()
    check_processes(loaded, here.count)
    if not here.leads:
        from edgedisp.follow import follow

        follow(loaded, run, threads_for(loaded))
        return
    check_before_start(loaded, run)
    with Screen(f"{loaded.name} -> {run}") as screen:
        walked = build_run(loaded, run, threads_for(loaded), screen)
        from edgedisp.summary import publish

        summary = publish(loaded, walked, run)
    _show(summary, run, as_json)
    if missing := summary["missing_tasks"]:
        raise BuildFailed(
            f"the report is written, but {', '.join(missing)} could not be scored: "
            f"{'; '.join(missing.values())}. The same command tries again and keeps the rest"
        )


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
    from edgedisp.console import Screen
    from edgedisp.pipeline import run_folder
    from edgedisp.plan import make_plan, render

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
    from edgedisp.console import Screen
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
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or their report.json files.")
    ],
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Print the before/after table of one or several runs."""
    from edgedisp.report import compare as compare_runs
    from edgedisp.report import render_arms, render_markdown, render_text, verdict
    from edgedisp.summary import load

    summaries = [load(run) for run in runs]
    compared = compare_runs(summaries)
    if as_json:
        typer.echo(json.dumps({"table": compared.as_json(), "verdicts": [verdict(one) for one in summaries]}))
        return
    typer.echo(render_markdown(compared) if markdown else render_text(compared, width()))
    for summary in summaries:
        typer.echo(f"\n{summary['name']}: {verdict(summary)['sentence']}")
        if others := render_arms(summary, width()):
            typer.echo(f"\n{others}")
