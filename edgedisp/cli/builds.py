"""The commands over recipes and runs: build, plan, pilot, recipes, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from edgedisp.cli.app import (
    LONGEST,
    HtmlOption,
    JsonOption,
    TasksPathOption,
    TextOption,
    TrustTaskCodeOption,
    app,
    output_file,
    show,
    width,
)
from edgedisp.core.distributed import get_world_size, is_main_process
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import data_folder
from edgedisp.core.progress import Screen
from edgedisp.core.run import Run

WEIGHTS = "0.03,0.1,0.3,1,3"
RecipeArgument = Annotated[str, Argument(metavar="RECIPE", help="A recipe file or packaged recipe.")]
SetOption = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="Override a key: --set train.tokens=10k")
]
SmokeOption = Annotated[bool, Option("--smoke", help="A tiny random model of the same architecture.")]
OutOption = Annotated[Path | None, Option("--out", help="The run folder; default runs/<recipe>-<hash>.")]
SubjectsArgument = Annotated[
    list[Path], Argument(metavar="RUN...", help="Run folders or report.json files; or two models or bundles.")
]


def load_recipe(recipe: str, overrides: list[str] | None, smoke: bool) -> Any:
    """The recipe of a file, or the packaged one of that name."""
    from edgedisp.recipe import load

    path = Path(recipe)
    if not path.exists() and path.parent == Path():
        packaged = {file.stem: file for file in sorted(data_folder("recipes").glob("*.yaml"))}
        name = path.stem if path.suffix in (".yaml", ".yml") else path.name  # `qwen3_0.6b` has no suffix
        if name not in packaged:
            names = ", ".join(packaged)
            raise BadInput(f"{recipe}: no such file, and no packaged recipe of that name (there are {names})")
        path = packaged[name]
    return load(path, overrides or (), smoke)


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
    from edgedisp.commands.plan import check_before_start, check_processes, slow_products, threads_for
    from edgedisp.pipeline.build_plan import build as build_run
    from edgedisp.pipeline.build_plan import run_folder

    loaded = load_recipe(recipe, set_, smoke)
    run = run_folder(loaded, out)
    check_processes(loaded, get_world_size())
    if not is_main_process():
        from edgedisp.pipeline.build_plan import stages
        from edgedisp.pipeline.stage import follow

        follow(stages(loaded, threads_for(loaded)), run)
        return
    check_before_start(loaded)
    if warning := slow_products(loaded):
        typer.echo(f"warning: {warning}", err=True)
    with Screen(f"{loaded.name} -> {run}") as screen:
        passed = build_run(loaded, run, threads_for(loaded), screen)
        from edgedisp.pipeline.run_results import publish

        results = publish(loaded, passed, run)
    from edgedisp.report import results_table, sections, verdict

    page, table = run / "report.html", results_table.table(results, all_arms=True)
    answers = results_table.answers_text(results, width())
    # The table of answers has all that a run without other tasks could show.
    is_whole = bool(answers) and sum(metric.kind != "cost" for metric in table.metrics) == 1
    blocks = ["" if is_whole else results_table.table_text(table, width()), sections.search_text(results)]
    blocks += [verdict.summary_text(results), answers, f"report: {page}"]
    if answers:
        blocks.append(f"try it: {results_table.chat_command(results, run)}")
    document = {"run": str(run), "report": str(page), "verdict": verdict.verdict(results).to_json()}
    show(document, "\n\n".join(filter(None, blocks)), as_json)
    _check_complete(results)


def _check_complete(results: Run) -> None:
    """BuildFailed where a task could not be scored: all else is done, and shown."""
    if missing := results.missing_tasks:
        raise BuildFailed(
            f"the report is written, but {', '.join(missing)} could not be scored: "
            f"{'; '.join(missing.values())}. The same command tries again and keeps the rest"
        )


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    smoke: SmokeOption = False,
    out: OutOption = None,
    probe: Annotated[bool, Option(help="Open the base and time a few training steps.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Say what a build would do: stages, which are done, steps, time, memory and disk."""
    from edgedisp.commands.plan import make_plan, render
    from edgedisp.pipeline.build_plan import run_folder

    loaded = load_recipe(recipe, set_, smoke)
    with Screen("plan") as screen:
        document = make_plan(loaded, run_folder(loaded, out), probe=probe, screen=screen)
    show(document, render(document), as_json)


@app.command()
def pilot(
    recipe: RecipeArgument,
    weights: Annotated[str, Option(metavar="W,...", help="Tried with all layers and variants.")] = WEIGHTS,
    tokens: Annotated[str, Option(metavar="COUNT", help="Training tokens of each candidate.")] = "20k",
    layers: Annotated[str | None, Option(metavar="L,...", help="Such as all,last_half.")] = None,
    variants: Annotated[str | None, Option(metavar="V,...", help="Such as angular,cosine.")] = None,
    set_: SetOption = None,
    smoke: SmokeOption = False,
    out: Annotated[Path | None, Option("--out", help="Default: runs/<recipe>-pilot-<hash>.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find out which dispersion settings do anything, on few tokens, before a build spends hours."""
    from edgedisp.commands import pilot as command
    from edgedisp.pipeline.build_plan import run_folder

    loaded = load_recipe(recipe, set_, smoke)
    trials = command.make_recipe(loaded, weights=weights, tokens=tokens, layers=layers, variants=variants)
    folder = run_folder(trials, out)
    with Screen(f"{trials.name} -> {folder}") as screen:
        candidates = command.run(trials, folder, screen)
    text = f"{command.render(trials, candidates, width())}\n\npicture: {folder / 'pilot.png'}"
    show({"run": str(folder), **command.summary(trials, candidates)}, text, as_json)


@app.command()
def init(
    chat: Annotated[Path, Option(metavar="ROWS", help="Your chat rows: a file or folder.")],
    base: Annotated[str, Option(metavar="ID", help="The base: a hub id, folder, .gguf file, pypi: file.")],
    out: Annotated[Path, Option("--out", callback=output_file, help="The recipe.")] = Path("recipe.yaml"),
    force: Annotated[bool, Option("--force", help="Replace the recipe that is there.")] = False,
) -> None:
    """Write a commented recipe for your own chat rows, and say what they hold."""
    from edgedisp.commands.init import describe, recipe_text, suggest, survey

    if out.exists() and not force:
        raise BadInput(f"{out}: is there already; --force replaces it, --out names another")
    with Screen("init") as screen:
        result = survey(chat, base, screen.progress)
    values = suggest(result)
    out.write_text(recipe_text(values, chat, base, out), encoding="utf-8")
    typer.echo("\n".join([*describe(result, values), f"written   {out}; next: edgedisp plan {out}"]))


@app.command()
def recipes() -> None:
    """List the packaged recipes."""
    for path in sorted(data_folder("recipes").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").strip()
        typer.echo(f"{path.stem:24} {first}")


@app.command()
def compare(
    subjects: SubjectsArgument,
    tasks: Annotated[str | None, Option(metavar="T,...", help="Of two models: tasks, such as small.")] = None,
    text: TextOption = None,
    tasks_path: TasksPathOption = None,
    trust_task_code: TrustTaskCodeOption = False,
    limit: Annotated[
        int | None, Option(min=1, max=10**9, help="Of two models: items a task; default 200.")
    ] = None,
    context: Annotated[
        int | None, Option(min=8, max=LONGEST, help="Of two models: tokens of a window.")
    ] = None,
    out: Annotated[
        Path | None, Option("--out", file_okay=False, help="Of two models: the report's folder.")
    ] = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
    markdown: Annotated[bool, Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Print the before/after table of runs, joined item by item, or of two models scored here."""
    from edgedisp.commands.compare import compare_models, join_runs
    from edgedisp.core.files import to_json
    from edgedisp.evaluate.heldout_tasks import SuiteOptions
    from edgedisp.pipeline.run_results import is_run
    from edgedisp.report import results_table
    from edgedisp.report.verdict import verdict

    models = [path for path in subjects if not is_run(path)]
    if models and not len(models) == len(subjects) == 2:
        raise BadInput(
            f"{models[0]}: holds no report.json, so it is no finished run; compare takes runs, or exactly "
            "two model folders or bundles"
        )
    if models:
        names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
        options = SuiteOptions(
            names, context or 256, limit or 200, tasks_path=tasks_path, trust_task_code=trust_task_code
        )
        with Screen("compare") as screen:
            joined, folder = compare_models(models, options, text, out, screen.progress)
        page, last = folder / "report.html", [f"report: {folder / 'report.html'}"]
    else:
        options_of_models = (tasks, text, tasks_path, limit, context, out, trust_task_code or None)
        if any(option is not None for option in options_of_models):
            raise BadInput("these options are for two models; runs are scored already")
        joined, page, last = join_runs(subjects), None, []
    result, table = verdict(joined), results_table.table(joined, all_arms=True)
    document = {"table": to_json(table), "verdict": result.to_json(), "joined": to_json(joined)}
    document["report"] = page and str(page)
    figures = results_table.table_markdown(table) if markdown else results_table.table_text(table, width())
    try:
        show(document, "\n\n".join([figures, result.sentence, *last]), as_json)
    finally:  # also where the reader of stdout has left
        if html is not None:
            from edgedisp.report import render  # brings matplotlib

            html.write_text(render.page(joined), encoding="utf-8")
            typer.echo(f"page: {html}", err=True)
    if models:
        _check_complete(joined)
