"""The application itself, what its commands share, and how a recipe is found by name.

Each command imports what it needs when it runs, so that help answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgedisp import __version__
from edgedisp.core import distributed as processes
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
# What devices score, for `bench` and `phone` alike.
ItemsOption = Annotated[
    int | None, typer.Option("--items", help="Items of each task scored there, 20 to 2000; default 200.")
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", help="Items of each task in the full set, scored here; default 500."),
]
TextOption = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="Documents of held-out tasks; default: the run's."),
]
TasksPathOption = Annotated[
    Path | None, typer.Option("--tasks-path", metavar="FOLDER", help="Your own lm-eval tasks.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]


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


def load_recipe(recipe: str, overrides: list[str] | None, smoke: bool) -> Any:
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


def width() -> int:
    """Columns of the terminal; 100 where there is none."""
    import shutil

    return shutil.get_terminal_size((100, 24)).columns
