"""A stage runs again when, and only when, something in its key has changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Screen
from edgedisp.core.stage_folder import Record
from edgedisp.pipeline.stage import Inputs, Stage, plain, state, walk

HERE = __name__


@dataclass(frozen=True)
class Options:
    number: int = 1
    words: tuple[str, ...] = ("a", "b")


def write(options: Options, inputs: Inputs, output_dir: Path, progress: Any) -> Any:
    """A stage function for the tests: what it writes is all that it got."""
    text = [str((options.number, options.words))]
    text += [(folder / "out.txt").read_text() for _, folder in sorted(inputs.items())]
    text += [path.read_text() for path in inputs.files.values()]
    (output_dir / "out.txt").write_text("\n".join(text))
    return {"number": options.number}


class Seen(Screen):
    """Lists the stages that ran."""

    def __init__(self) -> None:
        super().__init__("test")
        self.ran: list[str] = []

    def finished(self, name: str, record: Record) -> None:
        self.ran.append(name)


GRAPH = {"base": (), "corpus": ("base",), "a/model": ("base", "corpus"), "b/model": ("base", "corpus"),
         "a/int4": ("a/model",), "report": ("a/int4", "b/model")}  # fmt: skip


def plan(text: Path, changed: dict[str, Options] | None = None) -> list[Stage]:
    return [
        Stage(
            name, f"{HERE}:write", (changed or {}).get(name, Options()),
            {f"from_{place}": source for place, source in enumerate(sources)},
            files={"text": text} if name == "corpus" else {},
        )
        for name, sources in GRAPH.items()
    ]  # fmt: skip


def after(*names: str) -> set[str]:
    """The stages and all that read them, directly or not."""
    reached = set(names)
    for name, sources in GRAPH.items():
        if reached & set(sources):
            reached.add(name)
    return reached


def run(stages: list[Stage], folder: Path) -> set[str]:
    seen = Seen()
    folder.mkdir(exist_ok=True)
    walk(stages, folder, seen)
    return set(seen.ran)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("one")
    return path


def test_an_unchanged_plan_runs_nothing(tmp_path: Path, text: Path) -> None:
    assert run(plan(text), tmp_path / "run") == set(GRAPH)
    assert run(plan(text), tmp_path / "run") == set()
    assert all(record is not None for _, record in state(plan(text), tmp_path / "run"))


@settings(max_examples=12)  # each walks the plan twice
@given(name=st.sampled_from(sorted(GRAPH)), options=st.builds(Options, st.integers(), st.tuples(st.text())))
def test_changed_options_run_the_stage_and_those_after_it(
    name: str, options: Options, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("one")
    run(plan(folder / "text.txt"), folder / "run")
    expected = set() if plain(options) == plain(Options()) else after(name)
    assert run(plan(folder / "text.txt", {name: options}), folder / "run") == expected


def test_a_changed_byte_of_a_local_file_runs_its_stage_and_those_after_it(tmp_path: Path, text: Path) -> None:
    run(plan(text), tmp_path / "run")
    text.write_text("two")
    assert run(plan(text), tmp_path / "run") == after("corpus")


def test_a_local_folder_is_read_by_the_names_and_contents_of_its_files(tmp_path: Path) -> None:
    from edgedisp.pipeline.stage import FileHashes

    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "a.yaml").write_text("1")
    first = FileHashes(tmp_path).of(folder)
    (folder / "a.yaml").rename(folder / "b.yaml")
    second = FileHashes(tmp_path).of(folder)
    (folder / "b.yaml").write_text("2")
    assert len({first, second, FileHashes(tmp_path).of(folder)}) == 3


@pytest.mark.parametrize("stage", ["base", "a/model"])
def test_a_damaged_input_stops_the_stage_that_would_read_it(stage: str, tmp_path: Path, text: Path) -> None:
    run(plan(text), tmp_path / "run")
    path = tmp_path / "run" / stage / "out.txt"
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    reader = next(name for name, sources in GRAPH.items() if stage in sources)
    with pytest.raises(BuildFailed, match=str(path)):
        run(plan(text, {reader: Options(number=7)}), tmp_path / "run")


def test_an_input_that_was_made_again_runs_its_readers_only_where_its_files_differ(
    tmp_path: Path, text: Path
) -> None:
    run(plan(text), tmp_path / "run")
    stages = plan(text)
    stages[0] = replace(stages[0], function=f"{HERE}:write_again")  # another function, the same bytes
    assert run(stages, tmp_path / "run") == {"base"}


def write_again(options: Options, inputs: Inputs, output_dir: Path, progress: Any) -> Any:
    return write(options, inputs, output_dir, progress)
