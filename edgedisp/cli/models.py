"""The commands over models, bundles and devices: bench, phone, condensation, export, chat, doctor."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from edgedisp.bench.devices import BenchOptions, DeviceTasks
from edgedisp.cli.app import (
    LONGEST,
    MOST_THREADS,
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
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Screen

BundlesArgument = Annotated[list[Path], Argument(metavar="BUNDLE...", help="Folders with a model.onnx.")]
PromptOption = Annotated[int, Option(min=1, max=LONGEST, help="Prompt tokens.")]
GenerateOption = Annotated[int, Option(min=2, max=LONGEST, help="Tokens to generate.")]
RepetitionsOption = Annotated[int, Option(min=1, max=10_000, help="5 or more, to tell differences.")]
ScoreOption = Annotated[str | None, Option(metavar="T,...", help="Score items of these tasks: heldout ...")]
ItemsOption = Annotated[int | None, Option(min=20, max=2000, help="Scored items a task; default 200.")]
ReportOption = Annotated[bool, Option(help="Keep results in the bundles' run and show them in its report.")]


@app.command()
def bench(
    bundles: BundlesArgument,
    device: Annotated[
        list[str] | None,
        Option(help="local, llama.cpp, ssh://USER@HOST[:PORT], adb[:SERIAL] or browser; may be repeated."),
    ] = None,
    prompt: PromptOption = 128,
    generate: GenerateOption = 128,
    repetitions: RepetitionsOption = 5,
    threads: Annotated[str | None, Option(metavar="N|sweep", help="Default: the bundle's.")] = None,
    pause: Annotated[float, Option(min=0.0, max=3600.0, help="Seconds between repetitions.")] = 0.5,
    remote_python: Annotated[str | None, Option(metavar="PROGRAM", help="The device's Python.")] = None,
    score: ScoreOption = None,
    items: ItemsOption = None,
    text: TextOption = None,
    tasks_path: TasksPathOption = None,
    trust_task_code: TrustTaskCodeOption = False,
    html: HtmlOption = None,
    report: ReportOption = False,
    as_json: JsonOption = False,
) -> None:
    """Time bundles on devices, interleaved: time to first token, prefill and decode speed, memory.

    With --score also score them there, and compare with this machine's scores.
    """
    from edgedisp.bench.results import label_bundles
    from edgedisp.commands import devices as command
    from edgedisp.core.files import to_json
    from edgedisp.pipeline.device_results import bundles_by_run
    from edgedisp.report.devices import devices_text

    names = device or ["local"]
    options = BenchOptions(
        *(prompt, generate, repetitions, _threads(threads)),
        pause_s=pause,
        remote_python=remote_python,
        tasks=_tasks(score, items, text, tasks_path, trust_task_code),
    )
    by_run = bundles_by_run(label_bundles(bundles)) if report else {}
    if report and not by_run:
        raise BadInput(f"--report: {bundles[0]} lies in no run folder (RUN/ARM/NAME); take --html or --json")
    with Screen(f"bench on {', '.join(names)}") as screen:
        timed = command.time_bundles(bundles, names, options, screen.progress)
    try:
        show(to_json(timed), devices_text(timed["devices"], width()), as_json)
    finally:  # also where the reader of stdout has left
        if html is not None:
            from edgedisp.report.render import devices_page

            html.write_text(devices_page(timed["devices"]), encoding="utf-8")
        command.add_to_reports(timed["devices"], by_run)
    if timed["problems"]:
        raise BuildFailed(f"{'; '.join(timed['problems'])}. What was measured until then is shown")


def _threads(text: str | None) -> Any:
    """A thread count, "sweep", or None."""
    if text is None or text == "sweep":
        return text
    if not text.isdecimal() or len(text) > 4 or not 1 <= int(text) <= MOST_THREADS:
        raise BadInput(f"--threads {text}: is neither a whole number from 1 to {MOST_THREADS} nor `sweep`")
    return int(text)


def _tasks(
    score: str | None, items: int | None, text: Path | None, tasks_path: Path | None, trust_task_code: bool
) -> DeviceTasks | None:
    names = tuple(name.strip() for name in (score or "").split(",") if name.strip())
    options = score, items, text, tasks_path, trust_task_code or None
    if not names and any(option is not None for option in options):
        raise BadInput("--score: names no task, such as --score heldout, which the other options are for")
    return DeviceTasks(names, items or 200, text, tasks_path, trust_task_code) if names else None


@app.command()
def phone(
    bundles: BundlesArgument,
    host: Annotated[str | None, Option(help="Address to listen on.")] = None,
    port: Annotated[int, Option(min=0, max=65535, help="0 takes a free one.")] = 8717,
    https: Annotated[bool, Option("--https", help="Encrypt; allows threads.")] = False,
    prompt: PromptOption = 128,
    generate: GenerateOption = 128,
    repetitions: RepetitionsOption = 5,
    threads: Annotated[
        int | None, Option(min=1, max=MOST_THREADS, help="Default: as chosen on the page.")
    ] = None,
    score: ScoreOption = None,
    items: ItemsOption = None,
    text: TextOption = None,
    tasks_path: TasksPathOption = None,
    trust_task_code: TrustTaskCodeOption = False,
    once: Annotated[bool, Option("--once", help="End after the first complete result.")] = False,
    out: Annotated[
        Path | None, Option("--out", callback=output_file, help="Write every result to this JSON file.")
    ] = None,
    report: ReportOption = True,
    as_json: JsonOption = False,
) -> None:
    """Serve a page for phones: chat with bundles, and time them there; print what phones measured."""
    from edgedisp.bench.phone import PhoneOptions
    from edgedisp.commands.devices import measure_on_phones

    tasks = _tasks(score, items, text, tasks_path, trust_task_code)
    options = BenchOptions(prompt, generate, repetitions, threads, tasks=tasks)
    settings = PhoneOptions(host, port, https, once, out, report, as_json)
    measure_on_phones(bundles, options, settings, width(), typer.echo)


@app.command()
def condensation(
    model: Annotated[str, Argument(metavar="MODEL", help="A hub id, folder, .gguf file or bundle.")],
    compare: Annotated[str | None, Option(metavar="MODEL", help="Another, on the same sequences.")] = None,
    text: Annotated[Path | None, Option(help="Text to measure on; default: synthetic.")] = None,
    sequences: Annotated[int, Option(min=1, max=10_000, help="How many sequences.")] = 16,
    context: Annotated[int, Option(min=8, max=LONGEST, help="Tokens in each.")] = 256,
    out: Annotated[Path | None, Option("--out", file_okay=False, help="A folder for page and JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how condensed a model's token vectors are, layer by layer; a bundle's in its own graph."""
    from edgedisp.commands.condensation import measure
    from edgedisp.core.files import check_writable, to_json
    from edgedisp.report.layout import grid_text
    from edgedisp.report.sections import profile_grids

    if out:
        check_writable("--out", out)
    with Screen("condensation") as screen:
        names = [model, compare] if compare else [model]
        profiles = measure(names, text, sequences, context, screen.progress)
    tables = [grid_text(grid, width()) for grid in profile_grids(profiles) if grid.rows]
    show(to_json(profiles), "\n\n".join(tables), as_json)
    if out:
        from edgedisp.report.render import write_condensation

        typer.echo(f"\npage: {write_condensation(profiles, out)}", err=as_json)


@app.command()
def export(
    model: Annotated[Path, Argument(metavar="MODEL", help="A Hugging Face folder.")],
    target: Annotated[str, Option(help="Device profile: a name or a file.")] = "laptop-x64",
    layouts: Annotated[
        str | None, Option(metavar="L,...", help="onnxruntime-genai, transformers.js, optimum, gguf.")
    ] = None,
    out: Annotated[Path | None, Option("--out", help="Default: MODEL-TARGET beside it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a model folder to a bundle for a device, in the layouts of its runtimes."""
    from edgedisp.commands.export import export_bundle

    bundle = out or model.resolve().with_name(f"{model.resolve().name}-{Path(target).stem}")
    names = None if layouts is None else [name.strip() for name in layouts.split(",")]
    with Screen(f"export -> {bundle}") as screen:
        record = export_bundle(model, target, bundle, screen.progress, names)
    size, runtimes = f"{record['size_bytes'] / 1e6:.0f} MB", ", ".join(record["layouts"])
    text = f"{bundle}: {size}, {record['precision']}, for {runtimes}, opened and checked"
    show({"bundle": str(bundle), **record}, text, as_json)


@app.command()
def chat(
    bundle: Annotated[Path, Argument(metavar="BUNDLE", help="A bundle with a genai_config.json.")],
    prompt: Annotated[str | None, Option(help="Answer this one message and stop.")] = None,
    system: Annotated[str | None, Option(help="Default: that of app.json.")] = None,
    max_new_tokens: Annotated[int | None, Option(min=1, help="Default: 256 at most.")] = None,
    temperature: Annotated[float, Option(min=0.0, max=100.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, Option(min=0, max=2**31)] = 0,
    threads: Annotated[int | None, Option(min=1, max=MOST_THREADS, help="Default: the bundle's.")] = None,
    context: Annotated[int | None, Option(min=2, help="Default: 4096 at most.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print each answer as a line of JSON.")] = False,
) -> None:
    """Talk to a finished bundle through onnxruntime-genai; a line from standard input is one message.

    Answers go to stdout, all else to stderr; a tool call is shown as name(argument=value). At a terminal,
    Ctrl-C ends an answer, Ctrl-D the conversation.
    """
    from edgedisp.commands.chat import ChatOptions, Conversation

    interruptible = prompt is None and sys.stdin.isatty()
    options = ChatOptions(system, max_new_tokens, threads, context, temperature, seed, interruptible, as_json)
    write, note = partial(typer.echo, nl=False), partial(typer.echo, err=True)
    conversation = Conversation(bundle, options, write, note)
    if prompt is None:
        conversation.converse(_lines())
    else:
        conversation.answer(prompt)


def _lines() -> Iterator[str]:
    """What the user types, until Ctrl-D; the prompt sign only where stdout is no file of answers."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a message that is no text ends alone
    sign = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            yield input(sign)
        except EOFError:
            return


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Print versions, CPU features, threads and memory, what is missing and how to get it."""
    from edgedisp.bench.system import doctor as examine

    rows, lines = examine(), []
    for row in rows:
        lines.append(f"{row['status']:7}  {row['check']:28} {row['value']}")
        lines += [f"{'':38}{row['advice']}"] if row["advice"] else []
    show(rows, "\n".join(lines), as_json)
