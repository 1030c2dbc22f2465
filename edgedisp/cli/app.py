"""The application, options that several commands share, and the recipe that a name stands for.

Each command imports what it needs when it runs, so that help answers at once.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from edgedisp import __version__
from edgedisp.core.distributed import get_world_size
from edgedisp.core.errors import BadInput
from edgedisp.core.files import data_folder

app = typer.Typer(
    name="edgedisp",
    help="Mid-train a small language model under dispersion loss, quantize and export it, and see the gain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def output_file(option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse, before any work is done, a file that cannot be written."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise BadInput(f"{option.opts[0]} {path}: is a folder, or in one that is not there; name a file")
    return path


RecipeArgument = Annotated[str, Argument(metavar="RECIPE", help="A recipe file or packaged recipe.")]
SetOption = Annotated[
    list[str] | None, Option("--set", metavar="KEY=VALUE", help="Override a key: --set train.tokens=10k")
]
SmokeOption = Annotated[bool, Option("--smoke", help="A tiny random model of the same architecture.")]
OutOption = Annotated[Path | None, Option("--out", help="The run folder; default runs/<recipe>-<hash>.")]
JsonOption = Annotated[bool, Option("--json", help="Print one line of JSON.")]
TextOption = Annotated[
    Path | None, Option(metavar="FILE", help="Text for held-out tasks; default: the run's.")
]
TasksPathOption = Annotated[Path | None, Option(metavar="FOLDER", help="Your own lm-eval tasks.")]
HtmlOption = Annotated[
    Path | None, Option(metavar="FILE", callback=output_file, help="Write the result as one page.")
]


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"edgedisp {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[bool, Option(callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Common to all commands."""
    count = get_world_size()
    if count > 1 and context.invoked_subcommand != "build":
        raise BadInput(
            f"{context.invoked_subcommand}: is for one process, but {count} were started; `build` alone "
            "shares its training among several"
        )


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


def show(document: Any, text: str, as_json: bool) -> None:
    """Print a command's result as one line of JSON, or for a reader."""
    typer.echo(json.dumps(document, ensure_ascii=False) if as_json else text)


def width() -> int:
    """Columns of the terminal; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns
