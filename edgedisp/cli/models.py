"""The commands over one model, bundle or machine: condensation, export, bench, chat, doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgedisp.cli.app import ItemsOption, JsonOption, LimitOption, TasksPathOption, TextOption, app, width
from edgedisp.core.errors import BadInput, BuildFailed


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
    from edgedisp.commands import condensation as command
    from edgedisp.core.progress import Screen
    from edgedisp.core.serialization import to_json

    if out:
        command.check_out(out)
    options = command.CondensationOptions(text, sequences, context)
    with Screen("condensation") as screen:
        names = [model] if compare is None else [model, compare]
        profiles = command.measure(names, options, screen.progress)
        files = command.write(profiles, out) if out else []
    if as_json:
        typer.echo(json.dumps(to_json(profiles)))
        return
    typer.echo(command.text(profiles, width()))
    if files:
        typer.echo(f"\npage: {files[0]}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder.")],
    target: Annotated[
        str, typer.Option(help="Device profile: a name under export/targets, or a file of your own.")
    ] = "laptop-x64",
    layouts: Annotated[
        str | None,
        typer.Option(
            metavar="L,L,...", help="onnxruntime-genai, transformers.js, optimum; default: the profile's."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The bundle; default MODEL-TARGET beside it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a model folder to an ONNX bundle for a device, in the layouts of its runtimes."""
    from edgedisp.core.progress import Screen
    from edgedisp.single import export_for_target

    bundle = out or model.resolve().with_name(f"{model.resolve().name}-{Path(target).stem}")
    chosen = None if layouts is None else [name.strip() for name in layouts.split(",")]
    with Screen(f"export -> {bundle}") as screen:
        record = export_for_target(model, target, bundle, screen, chosen)
    if as_json:
        typer.echo(json.dumps({"bundle": str(bundle), **record}))
        return
    size, runtimes = f"{record['size_bytes'] / 1e6:.0f} MB", ", ".join(record["layouts"])
    typer.echo(f"{bundle}: {size}, {record['precision']}, for {runtimes}, opened and checked")


@app.command()
def bench(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Folders with a model.onnx.")],
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Where: local, ssh://USER@HOST[:PORT], adb[:SERIAL] or browser; may be given several times."
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 128,
    generate: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1, help="5 or more tell differences from chance.")] = 5,
    threads: Annotated[
        str | None,
        typer.Option(metavar="N|sweep", help="Default: what the bundle says; sweep: find the best count."),
    ] = None,
    write_threads: Annotated[
        bool, typer.Option("--write-threads", help="Write the best count of the sweep into the bundles.")
    ] = False,
    pause: Annotated[float, typer.Option(min=0.0, help="Seconds of rest between repetitions.")] = 0.5,
    setup: Annotated[
        bool, typer.Option("--setup", help="Install what the device lacks (numpy and onnxruntime).")
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave bundles and packages on the device, for the next time.")
    ] = False,
    remote_python: Annotated[
        str | None, typer.Option(metavar="PROGRAM", help="Python on the device; default: python3.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(metavar="T,T,...", help="Score items of these tasks there too: heldout ...")
    ] = None,
    items: ItemsOption = None,
    limit: LimitOption = None,
    text: TextOption = None,
    tasks_path: TasksPathOption = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with all devices.")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Keep results in the bundles' run, and show them in its report.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Time bundles on devices, interleaved: time to first token, prefill and decode speed, memory.

    With --score also score them there, and compare with this machine's scores.
    """
    from edgedisp.bench.devices import BenchOptions
    from edgedisp.core.progress import Screen
    from edgedisp.pipeline.run_results import device_result
    from edgedisp.report import devices_text
    from edgedisp.single import lost_devices, time_bundles
    from edgedisp.stages.device_scores import wished

    names = ["local"] if device is None else device
    options = BenchOptions(
        prompt=prompt,
        generate=generate,
        repetitions=repetitions,
        threads=_threads(threads),
        pause_s=pause,
        setup=setup,
        keep=keep,
        remote_python=remote_python,
    )
    if html is not None and not html.resolve().parent.is_dir():
        raise BadInput(f"--html {html}: there is no folder {html.parent}")
    in_runs = _in_runs(bundles) if report else {}
    with Screen(f"bench on {', '.join(names)}") as screen:
        wish = wished(score, items=items, limit=limit, text=text, tasks_path=tasks_path)
        timed = time_bundles(bundles, names, options, screen.progress, wish, write_threads=write_threads)
    results = [device_result(device) for device in timed["devices"]]
    if html is not None:
        from edgedisp.report.render import devices_page

        html.write_text(devices_page(results), encoding="utf-8")
    typer.echo(json.dumps(timed) if as_json else devices_text(results, width()))
    for label, count in (timed.get("written") or {}).items() if not as_json else ():
        typer.echo(f"{label}: {count} threads written into the bundle")
    if report:
        from edgedisp import device_results
        from edgedisp.commands.run_report import show_devices

        kept_in = {run for device in timed["devices"] for run in device_results.keep(device, in_runs)}
        for run in sorted(kept_in):
            typer.echo(show_devices(run), err=True)
    if lost := lost_devices(timed):
        raise BuildFailed(f"{'; '.join(lost)}. What was measured until then is shown")


def _in_runs(bundles: list[Path]) -> dict[str, Any]:
    """Where the bundles lie in runs, as they are before anything is timed."""
    from edgedisp.bench.results import label_bundles
    from edgedisp.commands.run_report import check_runs
    from edgedisp.device_results import places

    found = places(label_bundles(bundles))
    if not found:
        raise BadInput(
            f"--report: {bundles[0]} lies in no run folder (RUN/ARM/NAME); leave --report away, and take "
            "--html or --json"
        )
    check_runs(found)
    return found


def _threads(text: str | None) -> Any:
    """A thread count, "sweep", or None."""
    if text is None or text == "sweep":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"--threads {text}: is neither a whole number of at least 1 nor `sweep`")
    return int(text)


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
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: the bundle's own, at most the physical cores here.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Most tokens kept; default 4096, or the bundle's own if less.")
    ] = None,
) -> None:
    """Talk to a finished bundle through onnxruntime-genai; a line from standard input is one message.

    Answers go to stdout, all else to stderr. At a terminal, Ctrl-C ends an answer, Ctrl-D the conversation.
    """
    from edgedisp.bench.system import physical_cores
    from edgedisp.chat import chat as talk
    from edgedisp.core.files import check_files

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    at_terminal = sys.stdin.isatty()

    def ask() -> str | None:
        try:
            return input("> " if at_terminal and sys.stdout.isatty() else "")  # stdout is for the answers
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise BadInput(f"standard input: is not text in UTF-8 ({error})") from error

    check_files(bundle)
    stats = talk(
        bundle,
        prompt=prompt,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        threads=threads,
        cores=physical_cores(),
        context=context,
        interruptible=prompt is None and at_terminal,
        write=write,
        read=ask,
        note=lambda text: typer.echo(text, err=True),
    )
    typer.echo(stats.line(), err=True)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Print versions, CPU features, threads and memory, what is missing and how to get it."""
    from edgedisp.bench.doctor import doctor as examine
    from edgedisp.data import cache_folder

    rows = examine({"working folder": Path.cwd(), "cache": cache_folder()})
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        mark = {"ok": "ok     ", "warn": "warn   ", "missing": "missing"}[row["status"]]
        advice = f"\n{'':38}{row['advice']}" if row["advice"] else ""
        typer.echo(f"{mark}  {row['check']:28} {row['found']}{advice}")
