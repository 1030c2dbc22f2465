"""The commands over one model, bundle or machine: condensation, export, chat, doctor."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from edgedisp.cli.app import LONGEST, MOST_THREADS, JsonOption, app, show, width
from edgedisp.core.progress import Screen

ModelArgument = Annotated[str, Argument(metavar="MODEL", help="A hub id, folder, .gguf file or bundle.")]
LayoutsOption = Annotated[
    str | None, Option(metavar="L,...", help="onnxruntime-genai, transformers.js, optimum.")
]


@app.command()
def condensation(
    model: ModelArgument,
    compare: Annotated[str | None, Option(metavar="MODEL", help="Another, on the same sequences.")] = None,
    text: Annotated[Path | None, Option(help="Text to measure on; default: synthetic.")] = None,
    sequences: Annotated[int, Option(min=1, max=10_000, help="How many sequences.")] = 16,
    context: Annotated[int, Option(min=8, max=LONGEST, help="Tokens in each.")] = 256,
    out: Annotated[Path | None, Option("--out", file_okay=False, help="A folder for page and JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how condensed a model's token vectors are, layer by layer; a bundle's in its own graph."""
    from edgedisp.commands import condensation as command
    from edgedisp.core.files import check_writable, to_json

    if out:
        check_writable("--out", out)
    with Screen("condensation") as screen:
        names = [model, compare] if compare else [model]
        profiles = command.measure(names, text, sequences, context, screen.progress)
    show(to_json(profiles), command.text(profiles, width()), as_json)
    if out:
        from edgedisp.report.render import write_condensation

        typer.echo(f"\npage: {write_condensation(profiles, out)}", err=as_json)


@app.command()
def export(
    model: Annotated[Path, Argument(metavar="MODEL", help="A Hugging Face folder.")],
    target: Annotated[str, Option(help="Device profile: a name or a file.")] = "laptop-x64",
    layouts: LayoutsOption = None,
    out: Annotated[Path | None, Option("--out", help="Default: MODEL-TARGET beside it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a model folder to an ONNX bundle for a device, in the layouts of its runtimes."""
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
