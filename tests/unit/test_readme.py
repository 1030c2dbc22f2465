"""What the pages show must work: its commands parse, its files exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from edgedisp.cli import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shown_commands(*pages: Path) -> list[str]:
    """Lines of the pages' shell blocks, without comments and prompts."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_the_readme_opens_with_the_two_commands() -> None:
    commands = shown_commands(ROOT / "README.md")
    assert [line for line in commands if line.startswith("make ")][:2] == ["make quickstart", "make test"]
    assert README.index("make quickstart") < 1500
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize(
    "line", sorted({line for line in shown_commands(*PAGES) if line.startswith("edgedisp")})
)
def test_every_edgedisp_command_shown_is_one_that_is_accepted(line: str) -> None:
    # Parsed by the real command line, with every option checked; run for real in test_build.py.
    words = shlex.split(line)[1:]
    group = get_command(app)
    name, rest = words[0], words[1:]
    command = group.commands[name]  # type: ignore[attr-defined]
    context = command.make_context(name, rest, resilient_parsing=False)
    recipe = context.params.get("recipe")
    if recipe is not None:
        packaged = ROOT / "recipes" / f"{Path(recipe).stem}.yaml"
        assert packaged.is_file(), f"{recipe} is no recipe here"


@pytest.mark.parametrize("line", sorted({line for line in shown_commands(*PAGES) if line.startswith("make")}))
def test_every_make_target_shown_exists(line: str) -> None:
    target = shlex.split(line)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_exists(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_in_backticks_exists(page: Path) -> None:
    tops = ("edgedisp/", "recipes/", "export/", "tests/", "benchmarks/", "docs/")
    for word in re.findall(r"`([\w./*-]+)`", page.read_text(encoding="utf-8")):
        if word.startswith(tops) and word != "edgedisp/packaged/":
            assert list(ROOT.glob(word.rstrip("/"))), f"{page.name} names {word}"


def test_the_recipe_reference_is_what_the_schema_says() -> None:
    from edgedisp.recipe import reference

    assert reference().strip() in (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8"), (
        "docs/recipe.md is out of date: make docs"
    )


def test_the_keys_of_a_device_profile_are_what_the_schema_says() -> None:
    from edgedisp.recipe import Target, reference

    page = (ROOT / "docs" / "bundles.md").read_text(encoding="utf-8")
    assert page.endswith(reference(Target)), "docs/bundles.md is out of date: make docs"
