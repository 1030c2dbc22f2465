"""`edgedisp export`: what it cannot use is refused in one line, and nothing half-made is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgedisp.cli import main
from edgedisp.core.errors import BuildFailed
from edgedisp.core.stage_folder import finish, stage_output
from edgedisp.single import export_for_target

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model_folder(tiny_folder: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(tiny_folder["llama"], tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: (exit code, stdout, stderr)."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgedisp", "export", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capsys.readouterr())

    return run


def messages(err: str) -> list[str]:
    """The lines of stderr but its first, which says what is being made."""
    return [line for line in err.strip().splitlines() if not line.startswith("export -> ")]


# ---------------------------------------------------------------- bad model folders


def set_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weight(folder: Path, name: str, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def lie_about_width(folder: Path) -> None:
    set_config(folder, hidden_size=128)


def lie_about_depth(folder: Path) -> None:
    set_config(folder, num_hidden_layers=1)


def hold_nan(folder: Path) -> None:
    change_weight(folder, "model.layers.1.self_attn.k_proj.weight", float("nan"))


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def scramble_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(20)
        file.write(b"\x00\xff\x00")


def stray_from_the_record(folder: Path) -> None:
    """A record as a build leaves it, then one bit of a weight."""
    with stage_output(folder.with_name("recorded"), {}) as partial:
        for file in folder.iterdir():
            shutil.copyfile(file, partial / file.name)
        finish(partial, folder.with_name("recorded"), {}, {}, 0.0)
    shutil.rmtree(folder)
    folder.with_name("recorded").rename(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def be_a_stranger(folder: Path) -> None:
    set_config(folder, model_type="bloom")


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[1,")


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lie_about_width,
            "20 weights have another shape: model.embed_tokens.weight [512, 64] for [512, 128]",
        ),
        (lie_about_depth, "9 weights in the files have no place in the model that config.json describes: "),
        (hold_nan, "model.layers.1.self_attn.k_proj.weight holds 1 values that are not finite"),
        (cut_weights, "model.safetensors: the file is cut off or damaged"),
        (scramble_header, "model.safetensors: the file is cut off or damaged"),
        (stray_from_the_record, "model.safetensors is not the file that record.json was written for"),
        (be_a_stranger, "models of type 'bloom' cannot be exported; known types: "),
        (break_config, "config.json: no readable configuration"),
        (break_tokenizer, "tokenizer"),
        (lose_config, "config.json is missing"),
    ],
)
def test_a_folder_that_cannot_be_exported_is_refused_in_one_line(
    spoil: Callable[[Path], None], said: str, model_folder: Path, export: Run
) -> None:
    spoil(model_folder)
    before = sorted(path.name for path in model_folder.parent.iterdir())
    code, out, err = export(model_folder)
    assert (code, out) == (2, "")
    assert said in err and str(model_folder) in err and "Traceback" not in err
    assert len(messages(err)) == 1, err
    assert sorted(path.name for path in model_folder.parent.iterdir()) == before


def test_the_installed_command_says_the_same(model_folder: Path) -> None:
    lie_about_width(model_folder)
    ended = subprocess.run(
        [sys.executable, "-m", "edgedisp", "export", str(model_folder)], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "model.embed_tokens.weight [512, 64] for [512, 128]" in ended.stderr
    assert len(messages(ended.stderr)) == 1
    assert [path.name for path in model_folder.parent.iterdir()] == ["model"]


# ---------------------------------------------------------------- nothing changed, nothing half-made


def test_a_folder_that_cannot_be_written_to_is_exported_and_left_as_it_was(
    model_folder: Path, tmp_path: Path, export: Run
) -> None:
    def state() -> dict[str, tuple[int, int, bytes]]:
        paths = [model_folder, *sorted(model_folder.iterdir())]
        return {
            path.name: (path.stat().st_mtime_ns, path.stat().st_mode, path.read_bytes() * path.is_file())
            if path.is_file()
            else (path.stat().st_mtime_ns, path.stat().st_mode, b"")
            for path in paths
        }

    for path in model_folder.iterdir():
        path.chmod(0o444)
    model_folder.chmod(0o555)
    before = state()
    try:
        code, out, _ = export(model_folder, "--out", tmp_path / "bundle")
        assert code == 0 and "opened and checked" in out
        assert state() == before
    finally:
        model_folder.chmod(0o755)
    # And what is made of a read-only folder can be changed and removed.
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "bundle").iterdir())


class Stopping:
    """Takes reports of progress, and ends the work at one of them as Ctrl-C would."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.left, self.error, self.reports = at, error, 0

    def progress(self, done: int, total: int, note: str) -> None:
        self.reports += 1
        if not self.left:
            raise self.error
        self.left -= 1


def test_an_interrupted_export_leaves_nothing(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "there" / "bundle"
    whole = Stopping(-1, KeyboardInterrupt)
    export_for_target(model_folder, "laptop-x64", out, whole)  # type: ignore[arg-type]
    assert out.is_dir() and [path.name for path in out.parent.iterdir()] == ["bundle"]
    shutil.rmtree(out.parent)
    assert whole.reports > 8
    for at in range(0, whole.reports, 3):
        for error in (KeyboardInterrupt, BuildFailed):
            with pytest.raises(error):
                export_for_target(model_folder, "laptop-x64", out, Stopping(at, error))  # type: ignore[arg-type]
            assert not any(out.parent.iterdir()), (at, error)


def test_a_killed_export_leaves_no_bundle(model_folder: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle: there is no bundle, and the next export makes one."""
    script = """
import os, signal, sys
from pathlib import Path
from edgedisp.single import export_for_target
class Killing:
    def progress(self, done, total, note):
        if "quantizing" in note and done == 3:
            os.kill(os.getpid(), signal.SIGKILL)
export_for_target(Path(sys.argv[1]), "laptop-x64", Path(sys.argv[2]), Killing())
"""
    out = tmp_path / "bundle"
    ended = subprocess.run([sys.executable, "-c", script, str(model_folder), str(out)], capture_output=True)
    assert ended.returncode == -9 and not out.exists()
    export_for_target(model_folder, "laptop-x64", out, Stopping(-1, KeyboardInterrupt))  # type: ignore[arg-type]
    assert (out / "model.onnx").is_file()


def test_half_precision_weights_are_exported_as_they_are(
    model_folder: Path, tmp_path: Path, export: Run
) -> None:
    """The check of finite values must not trip over values that are large but sound."""
    weights = {
        name: weight.to(torch.bfloat16)
        for name, weight in load_file(model_folder / "model.safetensors").items()
    }
    save_file(weights, model_folder / "model.safetensors", {"format": "pt"})
    assert export(model_folder, "--out", tmp_path / "bundle")[0] == 0
