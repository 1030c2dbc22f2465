"""The commands that time bundles on devices: bench and phone."""

from __future__ import annotations

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
DeviceOption = Annotated[
    list[str] | None, Option(help="local, ssh://USER@HOST[:PORT], adb[:SERIAL] or browser; may be repeated.")
]
PromptOption = Annotated[int, Option(min=1, max=LONGEST, help="Prompt tokens.")]
GenerateOption = Annotated[int, Option(min=2, max=LONGEST, help="Tokens to generate.")]
RepetitionsOption = Annotated[int, Option(min=1, max=10_000, help="5 or more, to tell differences.")]
ScoreOption = Annotated[str | None, Option(metavar="T,...", help="Score items of these tasks: heldout ...")]
ItemsOption = Annotated[int | None, Option(min=20, max=2000, help="Scored items a task; default 200.")]
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
    out: JsonFileOption = None,
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
