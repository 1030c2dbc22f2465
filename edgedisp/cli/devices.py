"""The commands that time bundles on devices: bench and phone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from edgedisp.cli.app import HtmlOption, JsonOption, TasksPathOption, TextOption, app, output_file, width
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Screen

BundlesArgument = Annotated[list[Path], Argument(metavar="BUNDLE...", help="Folders with a model.onnx.")]
DeviceOption = Annotated[
    list[str] | None, Option(help="local, ssh://USER@HOST[:PORT], adb[:SERIAL] or browser; may be repeated.")
]
PromptOption = Annotated[int, Option(min=1, help="Prompt tokens.")]
GenerateOption = Annotated[int, Option(min=2, help="Tokens to generate.")]
RepetitionsOption = Annotated[int, Option(min=1, help="5 or more, to tell differences.")]
ScoreOption = Annotated[str | None, Option(metavar="T,...", help="Score items of these tasks: heldout ...")]
ItemsOption = Annotated[int | None, Option(help="Items of each task scored there; default 200.")]
LimitOption = Annotated[int | None, Option(help="Items of each task scored here; default 500.")]
ReportOption = Annotated[bool, Option(help="Keep results in the bundles' run and show them in its report.")]
JsonFileOption = Annotated[
    Path | None, Option("--out", callback=output_file, help="Write every result to this JSON file.")
]


@app.command()
def bench(
    bundles: BundlesArgument,
    device: DeviceOption = None,
    prompt: PromptOption = 128,
    generate: GenerateOption = 128,
    repetitions: RepetitionsOption = 5,
    threads: Annotated[str | None, Option(metavar="N|sweep", help="Default: the bundle's.")] = None,
    write_threads: Annotated[bool, Option(help="Write the sweep's best count into bundles.")] = False,
    pause: Annotated[float, Option(min=0.0, help="Seconds between repetitions.")] = 0.5,
    setup: Annotated[bool, Option("--setup", help="Install numpy and onnxruntime there.")] = False,
    keep: Annotated[bool, Option("--keep", help="Leave bundles and packages on the device.")] = False,
    remote_python: Annotated[str | None, Option(metavar="PROGRAM", help="The device's Python.")] = None,
    score: ScoreOption = None,
    items: ItemsOption = None,
    limit: LimitOption = None,
    text: TextOption = None,
    tasks_path: TasksPathOption = None,
    html: HtmlOption = None,
    report: ReportOption = False,
    as_json: JsonOption = False,
) -> None:
    """Time bundles on devices, interleaved: time to first token, prefill and decode speed, memory.

    With --score also score them there, and compare with this machine's scores.
    """
    from edgedisp.bench.devices import BenchOptions
    from edgedisp.commands import devices as command
    from edgedisp.core.files import to_json
    from edgedisp.report import devices_text

    names = device or ["local"]
    options = BenchOptions(
        *(prompt, generate, repetitions, _threads(threads)),
        pause_s=pause,
        setup=setup,
        keep=keep,
        remote_python=remote_python,
    )
    by_run = command.bundles_in_runs(bundles) if report else {}
    with Screen(f"bench on {', '.join(names)}") as screen:
        tasks = _tasks(score, items=items, limit=limit, text=text, tasks_path=tasks_path)
        timed = command.time_bundles(
            bundles, names, options, screen.progress, tasks, write_threads=write_threads
        )
    typer.echo(json.dumps(to_json(timed)) if as_json else devices_text(timed["devices"], width()))
    if html is not None:
        from edgedisp.report.render import devices_page

        html.write_text(devices_page(timed["devices"]), encoding="utf-8")
    for line in command.add_to_reports(timed, by_run):
        typer.echo(line, err=True)
    if problems := command.problems(timed):
        raise BuildFailed(f"{'; '.join(problems)}. What was measured until then is shown")


def _threads(text: str | None) -> Any:
    """A thread count, "sweep", or None."""
    if text is None or text == "sweep":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"--threads {text}: is neither a whole number of at least 1 nor `sweep`")
    return int(text)


def _tasks(score: str | None, **options: Any) -> Any:
    """The `DeviceTasks` that the options say; loads torch only where one is given."""
    if score is None and not any(options.values()):
        return None
    from edgedisp.pipeline.device_scores import device_tasks

    return device_tasks(score, **options)


@app.command()
def phone(
    bundles: BundlesArgument,
    host: Annotated[str | None, Option(help="Address to listen on.")] = None,
    port: Annotated[int, Option(min=0, max=65535, help="0 takes a free one.")] = 8717,
    https: Annotated[bool, Option("--https", help="Encrypt; allows threads.")] = False,
    prompt: PromptOption = 128,
    generate: GenerateOption = 128,
    repetitions: RepetitionsOption = 5,
    threads: Annotated[int | None, Option(min=1, help="Default: as chosen on the page.")] = None,
    score: ScoreOption = None,
    items: ItemsOption = None,
    limit: LimitOption = None,
    text: TextOption = None,
    tasks_path: TasksPathOption = None,
    once: Annotated[bool, Option("--once", help="End after the first complete result.")] = False,
    out: JsonFileOption = None,
    report: ReportOption = True,
    as_json: JsonOption = False,
) -> None:
    """Serve a page for phones: chat with bundles, and time them there; print what phones measured."""
    from edgedisp.bench.devices import BenchOptions
    from edgedisp.bench.phone import ServeOptions
    from edgedisp.commands.devices import PhoneOutput, measure_on_phones

    measure_on_phones(
        bundles,
        BenchOptions(prompt, generate, repetitions, threads),
        ServeOptions(host, port, https, once),
        _tasks(score, items=items, limit=limit, text=text, tasks_path=tasks_path),
        PhoneOutput(out, report, as_json, width(), typer.echo),
    )
