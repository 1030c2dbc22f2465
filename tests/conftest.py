"""Fixtures that several test files share: tiny models, a text file of made documents, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from graph_twins import TwinStore
from hypothesis import settings
from shared_store import SharedStore, TinyFolders
from tiny_build import write_recipe
from tiny_bundle import tiny_bundles

pytest_plugins = ["budget"]

# The same examples on every run and machine, and no clock: a red test must be about the change.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# Two processes of tests on two cores: one thread each is faster than fighting over them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> SharedStore:
    """Folders that are made once for all processes of this run."""
    return SharedStore.of_session(tmp_path_factory)


@pytest.fixture(scope="session")
def bundles(store: SharedStore) -> Mapping[str, Path]:
    """Tiny bundles `fp32`, `twin` and `int4`, as onnxruntime-genai's builder makes them."""
    return tiny_bundles(store)


@pytest.fixture(scope="session")
def tiny_folder(store: SharedStore) -> Mapping[str, Path]:
    """Folders of tiny random models with a tokenizer of their own, by architecture."""
    return TinyFolders(store)


@pytest.fixture(scope="session")
def twins(store: SharedStore) -> TwinStore:
    """Random models of every form (graph_twins.FORMS), their fp32 bundles and quantized ones."""
    return TwinStore(store)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A JSONL file of 120 made documents."""
    from edgedisp import data

    path = tmp_path / "text.jsonl"
    rows = [json.dumps({"text": document.text}) for document in data.synthetic_documents(120, seed=3)]
    path.write_text("\n".join(rows))
    return path


@dataclass
class Ended:
    """How a command ended, with what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def edgedisp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run the command line in this process: `edgedisp("build", ...)`."""
    from edgedisp.cli import main

    def run(*words: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["edgedisp", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Mapping[str, Path]
) -> tuple[Path, Path, Ended]:
    """A finished build of the tiny recipe by the installed command: recipe, run folder, how it ended."""
    from edgedisp import data

    folder = tmp_path_factory.mktemp("build")
    rows = [json.dumps({"text": document.text}) for document in data.synthetic_documents(120, seed=3)]
    (folder / "text.jsonl").write_text("\n".join(rows))
    recipe = write_recipe(folder, tiny_folder["llama"], "text.jsonl")
    command = [Path(sys.executable).parent / "edgedisp", "build", recipe, "--out", folder / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return recipe, folder / "run", Ended(done.returncode, done.stdout, done.stderr)
