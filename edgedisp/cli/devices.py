"""The commands that time bundles on devices: bench and phone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from edgedisp.cli.app import ItemsOption, JsonOption, LimitOption, TasksPathOption, TextOption, app, width
from edgedisp.core.errors import BadInput, BuildFailed

PromptOption = Annotated[int, typer.Option(min=1, help="Prompt tokens.")]
GenerateOption = Annotated[int, typer.Option(min=2, help="Tokens to generate.")]
ScoreOption = Annotated[
    str | None, typer.Option(metavar="T,T,...", help="Score items of these tasks there too: heldout ...")
]


@app.command()
def bench(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Folders with a model.onnx.")],
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Where: local, ssh://USER@HOST[:PORT], adb[:SERIAL] or browser; may be given several times."
        ),
    ] = None,
    prompt: PromptOption = 128,
    generate: GenerateOption = 128,
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
    score: ScoreOption = None,
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
    from edgedisp.commands.bench import add_to_reports, lost_devices, run_places, time_bundles
    from edgedisp.core.files import to_json
    from edgedisp.core.progress import Screen
    from edgedisp.pipeline.device_scores import wished
    from edgedisp.report import devices_text

    names = device or ["local"]
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
    places = run_places(bundles) if report else {}
    with Screen(f"bench on {', '.join(names)}") as screen:
        wish = wished(score, items=items, limit=limit, text=text, tasks_path=tasks_path)
        timed = time_bundles(bundles, names, options, screen.progress, wish, write_threads=write_threads)
    if html is not None:
        from edgedisp.report.render import devices_page

        html.write_text(devices_page(timed["devices"]), encoding="utf-8")
    typer.echo(json.dumps(to_json(timed)) if as_json else devices_text(timed["devices"], width()))
    for label, count in (timed.get("written") or {}).items() if not as_json else ():
        typer.echo(f"{label}: {count} threads written into the bundle")
    for line in add_to_reports(timed["devices"], places):
        typer.echo(line, err=True)
    if lost := lost_devices(timed):
        raise BuildFailed(f"{'; '.join(lost)}. What was measured until then is shown")


def _threads(text: str | None) -> Any:
    """A thread count, "sweep", or None."""
    if text is None or text == "sweep":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"--threads {text}: is neither a whole number of at least 1 nor `sweep`")
    return int(text)


@app.command()
def phone(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Folders made by the export.")],
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; default: this machine's on its network.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8717,
    https: Annotated[
        bool, typer.Option("--https", help="Encrypt, with a certificate made now: allows threads.")
    ] = False,
    prompt: PromptOption = 128,
    generate: GenerateOption = 128,
    repetitions: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: chosen on the page, 1 unless changed.")
    ] = None,
    score: ScoreOption = None,
    items: ItemsOption = None,
    limit: LimitOption = None,
    text: TextOption = None,
    tasks_path: TasksPathOption = None,
    once: Annotated[bool, typer.Option("--once", help="End after the first complete result.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write every result to this JSON file.")] = None,
    report: Annotated[
        bool, typer.Option(help="Keep results in the bundles' run, and show them in its report.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Serve a page for phones: chat with bundles, and time them there; print what phones measured."""
    from edgedisp.bench.devices import BenchOptions
    from edgedisp.bench.phone import ServeOptions
    from edgedisp.commands.phone import PhoneOutput, measure_on_phones

    measure_on_phones(
        bundles,
        BenchOptions(prompt, generate, repetitions, threads),
        ServeOptions(host, port, https, once),
        {"score": score, "items": items, "limit": limit, "text": text, "tasks_path": tasks_path},
        PhoneOutput(out, report, as_json, width()),
        typer.echo,
    )
