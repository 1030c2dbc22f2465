"""`edgedisp export`: what it writes, what it refuses, and that nothing incomplete remains."""

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
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import file_digest, list_files
from edgedisp.core.stage_folder import finish, stage_output
from edgedisp.graph.session import OnnxModel

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
Run = Callable[..., Any]  # the command line: exit code and output
BOX = {"name": "box", "description": "a box", "architecture": "arm64", "context": 64, "threads": 1}
NAMES = {"fp32": ("model", "fp32"), "int4": ("model_q4", "q4")}


@pytest.fixture
def base(tiny_folder: Mapping[str, Path], tmp_path: Path) -> Path:
    """A model folder with a licence beside it."""
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_folder["llama"], folder)
    (folder / "LICENSE").write_text("do what you like")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/model\n---\n")
    return folder


def box(folder: Path, **keys: Any) -> Path:
    """A device profile that no name has."""
    path = folder / "box.yaml"
    path.write_text(json.dumps(BOX | keys))  # JSON is YAML
    return path


def leave_settings_behind(folder: Path) -> None:
    """As the scripts and machines that trained a model do."""
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    for name, changes in (
        ("tokenizer.json", {"truncation": truncation}),
        ("config.json", {"_attn_implementation": "flash_attention_2", "dtype": "bf16"}),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_the_manifest_describes_the_folder(precision: str, base: Path, tmp_path: Path, edgedisp: Run) -> None:
    tokenizer_sha256 = file_digest(base / "tokenizer.json")
    leave_settings_behind(base)
    out, layouts = tmp_path / "out", ["optimum", "transformers.js", "onnxruntime-genai"]
    profile = box(tmp_path, precision=precision, layouts=layouts)
    ended = edgedisp("export", base, "--target", profile, "--out", out, "--json")
    assert ended.code == 0, ended
    record, manifest = json.loads(ended.out), json.loads((out / "manifest.json").read_text())
    assert manifest["files"] == list_files(out, without=("manifest.json", "README.md"))
    size = sum(entry["size_bytes"] for entry in manifest["files"].values())
    assert manifest["size_bytes"] == record["size_bytes"] == size
    assert manifest["tokenizer_sha256"] == tokenizer_sha256  # without the truncation
    assert "flash" not in (out / "config.json").read_text()
    assert manifest["context"] == OnnxModel(out, 1).context == 64
    assert record["layouts"] == ["onnxruntime-genai", "transformers.js", "optimum"] == [*manifest["layouts"]]
    name, dtype = NAMES[precision]
    assert manifest["layouts"]["transformers.js"]["graph"] == f"onnx/{name}.onnx"
    assert f'dtype: "{dtype}"' in manifest["layouts"]["transformers.js"]["load"]
    if precision == "fp32":
        assert manifest["grid"] is None
    else:
        grid = {"bits": 4, "group": 32, "symmetric": False, "head_bits": 8}
        assert manifest["grid"].items() >= (grid | {"accuracy_level": 4, "method": "rtn"}).items()
    assert (out / "LICENSE").read_text() == "do what you like"
    assert (manifest["base"]["license"], manifest["base"]["base"]) == ("mit", "org/model")
    provenance = manifest["provenance"]
    assert provenance["weights_sha256"] == file_digest(base / "model.safetensors")
    assert provenance["recipe"] is None and {*provenance["versions"]} >= {"torch", "onnxruntime"}
    card = (out / "README.md").read_text()
    assert "licence: mit" in card and "Nothing was measured" in card


def test_what_cannot_work_is_refused_in_a_line_before_anything_is_written(base: Path, edgedisp: Run) -> None:
    before = names_in(base.parent)
    for words, message in (
        (["--target", "phone"], "target 'phone': no such device profile; did you mean 'phone-arm64'?"),
        (["--layouts", "optimun"], "--layouts: 'optimun' is not known; did you mean 'optimum'?"),
        (["--out", base], "exists already; choose another --out"),
    ):
        ended = edgedisp("export", base, *words)
        assert ended.code == 2 and message in ended.err
        assert len(ended.err.splitlines()) <= 2 and names_in(base.parent) == before


def flip_last_bit(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def another_type(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "bloom"}))


def not_a_number(path: Path) -> None:
    weights = load_file(path)
    weights[K_PROJ].view(-1)[5] = float("nan")
    save_file(weights, path, {"format": "pt"})


def stray_from_the_record(path: Path) -> None:
    """Write a record as a build does, then change a bit of a weight."""
    folder, recorded = path.parent, path.parent.with_name("recorded")
    with stage_output(recorded, {}) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        finish(partial, recorded, {}, {}, 0.0)
    shutil.rmtree(folder)
    recorded.rename(folder)
    flip_last_bit(path)


@pytest.mark.parametrize(("name", "spoil", "message"), [
    ("config.json", another_type, "models of type 'bloom' cannot be exported; known types: "),
    ("config.json", Path.unlink, "not a model folder, there is no config.json"),
    ("chat_template.jinja", cut_off, "its chat template cannot be used"),
    ("model.safetensors", not_a_number, f"{K_PROJ} holds 1 values that are not finite"),
    ("model.safetensors", cut_off, "cannot be opened (damaged?)"),
    ("model.safetensors", stray_from_the_record, "copy or export the folder again"),
    ("generation_config.json", stray_from_the_record, "copy or export the folder again"),
])  # fmt: skip
def test_a_folder_that_cannot_be_exported_is_refused_in_one_line(
    name: str, spoil: Callable[[Path], None], message: str, base: Path, edgedisp: Run
) -> None:
    spoil(base / name)
    before = names_in(base.parent)
    ended = edgedisp("export", base)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err and str(base) in ended.err
    lines = [line for line in ended.err.strip().splitlines() if not line.startswith("export -> ")]
    assert len(lines) == 1 and names_in(base.parent) == before


def test_weights_of_a_layout_are_counted_or_refused_if_damaged(
    base: Path, tmp_path: Path, edgedisp: Run
) -> None:
    out, profile = tmp_path / "out", box(tmp_path, layouts=["onnxruntime-genai", "transformers.js"])
    assert edgedisp("export", base, "--target", profile, "--out", out).code == 0
    short = ("--prompt", "4", "--generate", "2", "--repetitions", "1", "--threads", "1", "--json")
    timed = json.loads(edgedisp("bench", out, *short).out)
    weights = out / "onnx" / "model_q4.onnx_data"
    size = (out / "model.onnx").stat().st_size + weights.stat().st_size
    assert timed["devices"][0]["rows"][0]["weights_bytes"] == size
    for damage, word in ((flip_last_bit, "SHA-256"), (cut_off, "bytes")):
        damage(weights)
        for words in (["bench", out], ["chat", out, "--prompt", "Hello"], ["condensation", out]):
            ended = edgedisp(*words)
            assert ended.code == 2 and str(weights) in ended.err and word in ended.err


@pytest.mark.parametrize("error", [KeyboardInterrupt, BuildFailed])
def test_an_interrupted_export_leaves_nothing(error: type[BaseException], base: Path, tmp_path: Path) -> None:
    reports: list[str] = []

    def progress(done: int, total: int, note: str) -> None:
        reports.append(note)
        if len(reports) == 5:
            raise error

    killed = tmp_path / "folder" / "bundle.partial"
    (killed / "fp32").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"bundle\.partial: is needed for unfinished files and holds others"):
        export_bundle(base, "laptop-x64", tmp_path / "folder" / "bundle", progress)
    (killed / ".lock").touch()
    with pytest.raises(error):
        export_bundle(base, "laptop-x64", tmp_path / "folder" / "bundle", progress)
    assert reports and not names_in(tmp_path / "folder")
