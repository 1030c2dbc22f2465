"""Fixtures that several test files share: tiny models, a text file of made documents, the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from graph_twins import TwinStore
from hypothesis import settings
from shared_store import SharedStore, TinyFolders
from tiny_build import Built, Command, Ended, write_documents, write_recipe
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
    return write_documents(tmp_path / "text.jsonl")


@pytest.fixture
def edgedisp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
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
def built(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Mapping[str, Path]) -> Built:
    """A finished build of the tiny recipe by the installed command."""
    folder = tmp_path_factory.mktemp("build")
    recipe = write_recipe(folder, tiny_folder["llama"], write_documents(folder / "text.jsonl").name)
    command = [Path(sys.executable).parent / "edgedisp", "build", recipe, "--out", folder / "run"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return Built(recipe, folder / "run", Ended(result.returncode, result.stdout, result.stderr))
