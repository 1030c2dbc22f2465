"""`edgedisp export`: what it writes, what it refuses, and that nothing half-made is ever left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from edgedisp.commands.export import export_bundle
from edgedisp.core.errors import BuildFailed
from edgedisp.core.files import file_digest, list_files
from edgedisp.core.stage_folder import finish, stage_output
from edgedisp.graph.session import OnnxModel

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
NAMES = {"int8": ("model_quantized", "q8"), "int4": ("model_q4", "q4")}


@pytest.fixture
def base(tiny_folder: Mapping[str, Path], tmp_path: Path) -> Path:
    """A model folder with a licence beside it."""
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_folder["llama"], folder)
    (folder / "LICENSE").write_text("do what you like")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/model\n---\n")
    return folder


def box(folder: Path, **keys: Any) -> Path:
    """A profile of one's own."""
    written = {"name": "box", "description": "a box", "architecture": "arm64", "context": 64, "threads": 1}
    path = folder / "box.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in {**written, **keys}.items()) + "\n")
    return path


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_manifest_says_all_that_is_in_the_folder(
    precision: str, base: Path, tmp_path: Path, edgedisp
) -> None:  # type: ignore[no-untyped-def]
    layouts = "[optimum, transformers.js, onnxruntime-genai]"
    out = tmp_path / "out"
    profile = box(tmp_path, precision=precision, layouts=layouts)
    ended = edgedisp("export", base, "--target", profile, "--out", out, "--json")
    assert ended.code == 0, ended
    shown, manifest = json.loads(ended.out), json.loads((out / "manifest.json").read_text())
    assert manifest["files"] == list_files(out, without=("manifest.json", "README.md"))
    size = sum(entry["size_bytes"] for entry in manifest["files"].values())
    assert manifest["size_bytes"] == shown["size_bytes"] == size
    assert manifest["tokenizer_sha256"] == file_digest(base / "tokenizer.json")
    assert manifest["context"] == OnnxModel(out, 1).context == 64
    assert (
        list(manifest["layouts"]) == shown["layouts"] == ["onnxruntime-genai", "transformers.js", "optimum"]
    )
    name, dtype = NAMES.get(precision, ("model", "fp32"))
    assert manifest["layouts"]["transformers.js"]["graph"] == f"onnx/{name}.onnx"
    assert f'dtype: "{dtype}"' in manifest["layouts"]["transformers.js"]["load"]
    grid = manifest["grid"]
    if precision == "fp32":
        assert grid is None
    else:
        names = ("bits", "group", "symmetric", "head_bits", "accuracy_level", "method")
        assert [grid[name] for name in names] == [int(precision[3:]), 32, False, 8, 4, "rtn"]


def test_the_licence_and_the_weights_hash_are_taken_along(base: Path, tmp_path: Path, edgedisp) -> None:  # type: ignore[no-untyped-def]
    assert edgedisp("export", base, "--target", box(tmp_path), "--out", tmp_path / "out").code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (tmp_path / "out" / "LICENSE").read_text() == "do what you like"
    assert (manifest["base"]["license"], manifest["base"]["base"]) == ("mit", "org/model")
    assert manifest["provenance"]["weights_sha256"] == file_digest(base / "model.safetensors")
    assert manifest["provenance"]["recipe"] is None
    assert set(manifest["provenance"]["versions"]) >= {"torch", "onnxruntime"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "licence: mit" in card and "Nothing was measured" in card


def test_what_cannot_work_is_refused_in_a_line_before_anything_is_written(base: Path, edgedisp) -> None:  # type: ignore[no-untyped-def]
    before = names_in(base.parent)
    for words, message in (
        (["--target", "phone"], "target 'phone': no such device profile; did you mean 'phone-arm64'?"),
        (["--layouts", "optimun"], "--layouts: 'optimun' is not known; did you mean 'optimum'?"),
        (["--out", base], "exists already; choose another --out"),
    ):
        ended = edgedisp("export", base, *words)
        assert ended.code == 2
        assert message in ended.err and len(ended.err.strip().splitlines()) <= 2  # one names the work
        assert "Traceback" not in ended.err and names_in(base.parent) == before


def set_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weight(folder: Path, name: str, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


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


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: set_config(folder, hidden_size=128),
            "20 weights have another shape: model.embed_tokens.weight [512, 64] for [512, 128]",
        ),
        (
            lambda folder: change_weight(folder, K_PROJ, float("nan")),
            f"{K_PROJ} holds 1 values that are not finite",
        ),
        (cut_weights, "is cut off: "),
        (stray_from_the_record, "model.safetensors is not the file that record.json was written for"),
        (
            lambda folder: set_config(folder, model_type="bloom"),
            "models of type 'bloom' cannot be exported; known types: ",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not readable as JSON"),
        (lose("config.json"), "no config.json; export takes a Hugging Face folder"),
        (lose("tokenizer.json"), "no tokenizer.json"),
        (lose("model.safetensors"), "save_pretrained"),
    ],
)
def test_a_folder_that_cannot_be_exported_is_refused_in_one_line(
    spoil: Callable[[Path], None], message: str, base: Path, edgedisp
) -> None:  # type: ignore[no-untyped-def]
    spoil(base)
    before = names_in(base.parent)
    ended = edgedisp("export", base)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err and str(base) in ended.err and "Traceback" not in ended.err
    lines = [line for line in ended.err.strip().splitlines() if not line.startswith("export -> ")]
    assert len(lines) == 1 and names_in(base.parent) == before


@pytest.mark.parametrize("command", ["bench", "chat", "condensation"])
def test_a_damaged_bundle_is_refused_before_it_is_opened(
    command: str, base: Path, tmp_path: Path, edgedisp
) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    assert edgedisp("export", base, "--target", box(tmp_path), "--out", out).code == 0
    weights = out / "model.onnx.data"
    whole = weights.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged, word in ((whole[:-1], "bytes"), (flipped, "SHA-256")):
        weights.write_bytes(damaged)
        ended = edgedisp(command, out, *(["--prompt", "Hello"] if command == "chat" else []))
        assert ended.code == 2
        assert str(weights) in ended.err and word in ended.err


def test_a_folder_that_cannot_be_written_to_is_exported_and_left_as_it_was(
    base: Path, tmp_path: Path, edgedisp
) -> None:  # type: ignore[no-untyped-def]
    def state() -> list[tuple[str, int, int]]:
        return [(p.name, p.stat().st_mtime_ns, p.stat().st_mode) for p in (base, *sorted(base.iterdir()))]

    for path in base.iterdir():
        path.chmod(0o444)
    base.chmod(0o555)
    before = state()
    try:
        ended = edgedisp("export", base, "--target", "phone-arm64")
        assert ended.code == 0 and "for onnxruntime-genai, opened and checked" in ended.out
        assert state() == before
    finally:
        base.chmod(0o755)
    # And what is made of a read-only folder can be changed and removed.
    assert all(path.stat().st_mode & 0o200 for path in base.with_name("tiny-phone-arm64").iterdir())


class Stopping:
    """Takes reports of progress, and ends the work at one of them as Ctrl-C would."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.left, self.error, self.reports = at, error, 0

    def __call__(self, done: int, total: int, note: str) -> None:
        self.reports += 1
        if not self.left:
            raise self.error
        self.left -= 1


def test_an_interrupted_export_leaves_nothing(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "there" / "bundle"
    whole = Stopping(-1, KeyboardInterrupt)
    export_bundle(base, "laptop-x64", out, whole)
    assert out.is_dir() and names_in(out.parent) == {"bundle"}
    shutil.rmtree(out.parent)
    assert whole.reports > 8
    for at, error in (
        (0, BuildFailed),
        (whole.reports // 2, KeyboardInterrupt),
        (whole.reports - 1, BuildFailed),
    ):
        with pytest.raises(error):
            export_bundle(base, "laptop-x64", out, Stopping(at, error))
        assert not names_in(out.parent), (at, error)


def test_bench_counts_weights_that_lie_with_another_layout(base: Path, tmp_path: Path, edgedisp) -> None:  # type: ignore[no-untyped-def]
    profile = box(tmp_path, layouts="[onnxruntime-genai, transformers.js]")
    assert edgedisp("export", base, "--target", profile, "--out", tmp_path / "out").code == 0
    short = ("--prompt", "4", "--generate", "2", "--repetitions", "1", "--threads", "1", "--json")
    timed = json.loads(edgedisp("bench", tmp_path / "out", *short).out)
    files = ("model.onnx", "onnx/model_q4.onnx_data")
    assert timed["devices"][0]["rows"][0]["weights_bytes"] == sum(
        (tmp_path / "out" / name).stat().st_size for name in files
    )
