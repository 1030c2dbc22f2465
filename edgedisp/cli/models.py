"""The commands over one model, bundle or machine: condensation, export, chat, doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from edgedisp.cli.app import JsonOption, app, width
from edgedisp.core.errors import BadInput


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
    from edgedisp.core.files import to_json
    from edgedisp.core.progress import Screen

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
    from edgedisp.commands.export import export_bundle
    from edgedisp.core.progress import Screen

    bundle = out or model.resolve().with_name(f"{model.resolve().name}-{Path(target).stem}")
    chosen = None if layouts is None else [name.strip() for name in layouts.split(",")]
    with Screen(f"export -> {bundle}") as screen:
        record = export_bundle(model, target, bundle, screen, chosen)
    if as_json:
        typer.echo(json.dumps({"bundle": str(bundle), **record}))
        return
    size, runtimes = f"{record['size_bytes'] / 1e6:.0f} MB", ", ".join(record["layouts"])
    typer.echo(f"{bundle}: {size}, {record['precision']}, for {runtimes}, opened and checked")


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
    from edgedisp.commands.chat import ChatOptions
    from edgedisp.commands.chat import chat as run_chat
    from edgedisp.core.files import check_files

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    at_terminal = sys.stdin.isatty()

    def read() -> str | None:
        try:
            return input("> " if at_terminal and sys.stdout.isatty() else "")  # stdout is for the answers
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise BadInput(f"standard input: is not text in UTF-8 ({error})") from error

    check_files(bundle)
    options = ChatOptions(
        prompt=prompt,
        system=system,
        max_new_tokens=max_new_tokens,
        threads=threads,
        cores=physical_cores(),
        context=context,
        temperature=temperature,
        seed=seed,
        interruptible=prompt is None and at_terminal,
    )
    stats = run_chat(bundle, options, write=write, read=read, note=lambda text: typer.echo(text, err=True))
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
