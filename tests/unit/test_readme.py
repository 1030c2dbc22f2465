"""What the pages show must work: its commands parse, its files exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from key_tables import reference
from typer.main import get_command

from edgedisp.cli.app import app
from edgedisp.cli.builds import load_recipe
from edgedisp.recipe import Target

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").glob("*.md"))]
TOPS = ("edgedisp/", "recipes/", "export/", "tests/", "benchmarks/", "docs/")


def shown_commands(*pages: Path) -> list[str]:
    """Lines of the pages' shell blocks, without comments and prompts."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_the_readme_opens_with_the_two_commands() -> None:
    commands = shown_commands(ROOT / "README.md")
    assert [line for line in commands if line.startswith("make ")][:2] == ["make quickstart", "make test"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.index("make quickstart") < 1500 and len(text.splitlines()) <= 150


@pytest.mark.parametrize(
    "words",
    sorted(
        {match[1] for line in shown_commands(*PAGES) if (match := re.search(r"(?:^|-m )edgedisp (.+)", line))}
    ),
)
def test_every_edgedisp_command_shown_is_one_that_is_accepted(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Parsed by the real command line, with every option checked; run for real in test_build.py.
    monkeypatch.chdir(ROOT)
    name, *arguments = shlex.split(words)
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    options = command.make_context(name, arguments, resilient_parsing=False).params
    if "recipe" in options:
        load_recipe(options["recipe"], options["set_"], options["smoke"])


def test_every_make_target_shown_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for line in shown_commands(*PAGES):
        if line.startswith("make"):
            assert re.search(rf"^{shlex.split(line)[1]}:", makefile, flags=re.MULTILINE), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for word in re.findall(r"`([\w./*-]+)`", text):
        if word.startswith(TOPS) and word != "edgedisp/packaged/":
            assert list(ROOT.glob(word.rstrip("/"))), f"{page.name} names {word}"


def test_the_tables_of_keys_are_what_the_schema_says() -> None:
    recipe_page, bundles_page = (
        (ROOT / "docs" / name).read_text("utf-8") for name in ("recipe.md", "bundles.md")
    )
    assert reference().strip() in recipe_page, "docs/recipe.md is out of date: make docs"
    assert bundles_page.endswith(reference(Target)), "docs/bundles.md is out of date: make docs"
