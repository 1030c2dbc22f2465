"""The command that brings bundles to a phone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from edgedisp import BadInput, data_folder
from edgedisp.cli.app import JsonOption, app


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
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 128,
    generate: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: chosen on the page, 1 unless changed.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="End after the first complete result.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write every result to this JSON file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a page for phones: chat with bundles, and time them there; print what phones measured."""
    from edgedisp.bench import phone as serving
    from edgedisp.bench.page_bundle import read_bundles
    from edgedisp.bench.page_plan import PagePlan
    from edgedisp.bench.summary import labelled
    from edgedisp.folder import check_files, write_json

    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise BadInput(f"--out {out}: is a folder, or in one that is not there; name a file")
    for bundle in bundles:
        if bundle.is_dir():
            check_files(bundle)
    served = read_bundles(labelled(bundles))
    plan = PagePlan(served, prompt, generate, repetitions, threads)
    kept: list[dict[str, Any]] = []

    def arrived(result: dict[str, Any]) -> None:
        kept.append(result)
        if out is not None:  # at once: later phones may come or not
            write_json(out, {"format": 1, "devices": kept})
        if not as_json:
            typer.echo(serving.render(result) + "\n")

    results = serving.serve(
        plan,
        data_folder("export") / "web",
        host=host,
        port=port,
        https=https,
        once=once,
        note=lambda line: typer.echo(line, err=True),
        arrived=arrived,
    )
    if not results:
        raise KeyboardInterrupt  # ended before anything came
    for partial in [result for result in results if not result["complete"] and not as_json]:
        typer.echo(serving.render(partial) + "\n")
    if out is not None:
        write_json(out, {"format": 1, "devices": results})
        typer.echo(f"results: {out}", err=True)
    if as_json:
        typer.echo(json.dumps({"format": 1, "devices": results}, ensure_ascii=False))
