"""The command line: what is typed, what is shown, and which exit code it ends with.

Exit codes: 0 done, 1 failed, 2 bad recipe or usage, 130 interrupted. Results go to stdout, progress to
stderr. Each command imports what it needs when it runs, so that help answers at once.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgedisp import BadInput, BuildFailed, __version__, data_folder, processes

app = typer.Typer(
    name="edgedisp",
    help="Mid-train a small language model under dispersion loss, quantize and export it, and see the gain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a packaged recipe.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key: --set train.tokens=10k"),
]
SmokeOption = Annotated[
    bool, typer.Option("--smoke", help="A tiny random model of the same architecture, every stage.")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="The run folder; default runs/<recipe>-<hash>.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]


INTERRUPTED = 130
INTERRUPTED_MESSAGE = "interrupted; the same command continues where this one stopped"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgedisp {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Common to all commands."""
    count = processes.place().count
    if count > 1 and context.invoked_subcommand != "build":
        raise BadInput(
            f"{context.invoked_subcommand}: is for one process, but {count} were started; `build` alone "
            "shares its training among several"
        )


def _load_recipe(recipe: str, overrides: list[str] | None, smoke: bool) -> Any:
    from edgedisp.recipe import load

    path = Path(recipe)
    name = path.stem if path.suffix in (".yaml", ".yml") else path.name  # `qwen3_0.6b` has no suffix
    packaged = data_folder("recipes") / f"{name}.yaml"
    if not path.exists() and path.parent == Path() and packaged.is_file():
        path = packaged
    elif not path.exists() and packaged.is_file():
        raise BadInput(
            f"{recipe}: no such file; the packaged recipe of that name is `{name}`, without a folder"
        )
    elif not path.exists() and path.parent == Path():
        names = ", ".join(sorted(found.stem for found in data_folder("recipes").glob("*.yaml")))
        raise BadInput(f"{recipe}: no such file, and no packaged recipe of that name (there are {names})")
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
    from edgedisp.console import Screen
    from edgedisp.pipeline import build as build_run
    from edgedisp.pipeline import run_folder
    from edgedisp.plan import check_before_start, check_processes, threads_for

    loaded = _load_recipe(recipe, set_, smoke)
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


def _show(summary: dict[str, Any], run: Path, as_json: bool) -> None:
    from edgedisp.report import render_arms, render_text, table, verdict

    if as_json:
        shown = {"run": str(run), "report": str(run / "report.html"), "verdict": verdict(summary)}
        typer.echo(json.dumps(shown, ensure_ascii=False))
        return
    typer.echo(render_text(table(summary), _width()))
    typer.echo("")
    if others := render_arms(summary, _width()):
        typer.echo(f"{others}\n")
    typer.echo(verdict(summary)["sentence"])
    typer.echo("")
    typer.echo(f"report: {run / 'report.html'}")


def _width() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns


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

    loaded = _load_recipe(recipe, set_, smoke)
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

    loaded = _load_recipe(recipe, set_, smoke)
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
    typer.echo(render_markdown(compared) if markdown else render_text(compared, _width()))
    for summary in summaries:
        typer.echo(f"\n{summary['name']}: {verdict(summary)['sentence']}")
        if others := render_arms(summary, _width()):
            typer.echo(f"\n{others}")


@app.command()
def condensation(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A hub id, a Hugging Face folder, a .gguf file or a bundle."),
    ],
    compare: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A second model, measured on the same sequences.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text to measure on; default: made text.")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="How many sequences.")] = 16,
    context: Annotated[int, typer.Option(min=8, help="Tokens in each.")] = 256,
    out: Annotated[
        Path | None, typer.Option("--out", help="A folder for condensation.json, pictures and a page.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how condensed a model's token vectors are, layer by layer; a bundle's in its own graph."""
    from edgedisp import instrument
    from edgedisp.console import Screen

    if out:
        instrument.check_out(out)
    with Screen("condensation") as screen:
        found = instrument.condensation(
            model, compare, text=text, sequences=sequences, context=context, progress=screen.progress
        )
        files = instrument.write(found, out) if out else []
    typer.echo(json.dumps(instrument.plain(found)) if as_json else instrument.render(found))
    if files and not as_json:
        typer.echo(f"\npage: {files[0]}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder.")],
    target: Annotated[str, typer.Option(help="Device profile: a name under export/targets.")] = "laptop-x64",
    out: Annotated[
        Path | None, typer.Option("--out", help="The bundle; default MODEL-TARGET beside it.")
    ] = None,
) -> None:
    """Export a model folder to an ONNX bundle for a device."""
    from edgedisp.console import Screen
    from edgedisp.single import export_for_target

    bundle = out or model.with_name(f"{model.name}-{target}")
    with Screen(f"export -> {bundle}") as screen:
        record = export_for_target(model, target, bundle, screen)
    typer.echo(f"{bundle}: {record['size_bytes'] / 1e6:.0f} MB, {record['precision']}, opened and checked")


@app.command()
def bench(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Folders with a model.onnx.")],
    device: Annotated[str, typer.Option(help="Where to run: local.")] = "local",
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 128,
    generate: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the physical cores available.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time bundles on a device, interleaved: time to first token, prefill and decode speed, memory."""
    from edgedisp.console import Screen
    from edgedisp.single import render_bench, time_bundles

    with Screen(f"bench on {device}") as screen:
        timed = time_bundles(bundles, device, prompt, generate, repetitions, threads, screen.progress)
    typer.echo(json.dumps(timed) if as_json else render_bench(timed))


@app.command()
def chat(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle with a genai_config.json.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this one message and stop.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default 256, less in a small context.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Talk to a finished bundle through onnxruntime-genai."""
    from edgedisp.bench.machine import physical_cores
    from edgedisp.chat import chat as talk

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    def ask() -> str | None:
        try:
            return input("> ")
        except EOFError:
            return None

    stats = talk(
        bundle,
        prompt=prompt,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        threads=threads or physical_cores(),
        write=write,
        read=ask,
        note=lambda text: typer.echo(text, err=True),
    )
    typer.echo(stats.line(), err=True)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Print versions, CPU features, threads and memory, what is missing and how to get it."""
    from edgedisp.bench.machine import doctor as examine
    from edgedisp.sources import cache_folder

    rows = examine({"working folder": Path.cwd(), "cache": cache_folder()})
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        mark = {"ok": "ok     ", "warn": "warn   ", "missing": "missing"}[row["status"]]
        advice = f"\n{'':38}{row['advice']}" if row["advice"] else ""
        typer.echo(f"{mark}  {row['check']:28} {row['found']}{advice}")


def main() -> None:
    """The entry point: every failure becomes one message and its exit code."""
    # Says at import that a kernel package is missing which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        code = _run()  # Typer turns Ctrl-C into the return value 130
        if code == INTERRUPTED:
            _end(INTERRUPTED_MESSAGE, INTERRUPTED)
    except BadInput as error:
        _end(str(error), 2)
    except BuildFailed as error:
        _end(f"failed: {error}", 1)
    except KeyboardInterrupt:
        _end(INTERRUPTED_MESSAGE, INTERRUPTED)
    except OSError as error:
        if _disk_is_full(error):
            _end(_disk_message(error), 1)
        raise
    except Exception as error:
        # click's own usage errors carry their exit code and their message.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        if _disk_is_full(error):
            _end(_disk_message(error), 1)
        raise


def _run() -> Any:
    """The command. What fails in one of several processes has nearly always failed in process 0 too.

    So the others wait before they tell, in which time the launcher ends them. Process 0 waits a moment with
    an error that has no message of ours: it may come from another process that went away.
    """
    try:
        return app(standalone_mode=False)
    except KeyboardInterrupt:
        raise
    except (BadInput, BuildFailed):
        _after_the_first()
        raise
    except Exception:
        here = processes.place()
        if here.count > 1 and here.leads:
            processes.stand_back(1)
        _after_the_first()
        raise


def _after_the_first() -> None:
    if not processes.leads():
        processes.stand_back()


def _disk_is_full(error: BaseException) -> bool:
    """Also when a library has put its own error in the place of the system's (safetensors, torch.save)."""
    full = {errno.ENOSPC, errno.EDQUOT}
    words = (os.strerror(errno.ENOSPC), "iostream error")
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in full or any(word in str(seen) for word in words):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _disk_message(error: BaseException) -> str:
    where = getattr(error, "filename", None)
    return (
        f"failed: the disk is full{f' ({where})' if where else ''}; free some space and run the same "
        "command again: finished stages are kept"
    )


def _end(message: str, code: int) -> None:
    if processes.leads():
        sys.stderr.write(f"edgedisp: {message}\n")
    elif code != INTERRUPTED:
        sys.stderr.write(f"edgedisp: process {processes.place().index}: {message}\n")
    sys.exit(code)
