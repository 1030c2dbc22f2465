"""`edgedisp export`: what it writes, what it refuses, and that nothing half-made is ever left."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedisp.core.stage_folder import check_files, file_digest, list_files
from edgedisp.graph.session import OnnxModel
from edgedisp.models import TorchModel, load

NAMES = {"int8": ("model_quantized", "q8"), "int4": ("model_q4", "q4")}


@pytest.fixture
def base(tiny_folder: dict[str, Path], tmp_path: Path) -> Path:
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


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_bundle_stands_beside_its_model_under_the_targets_name(base: Path, edgedisp) -> None:  # type: ignore[no-untyped-def]
    ended = edgedisp("export", base, "--target", "phone-arm64")
    assert ended.code == 0, ended
    bundle = base.with_name("tiny-phone-arm64")
    assert "for onnxruntime-genai, opened and checked" in ended.out
    assert left(base.parent) == {"tiny", "tiny-phone-arm64"}
    assert check_files(bundle)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_manifest_says_all_that_is_in_the_folder(
    precision: str, base: Path, tmp_path: Path, edgedisp
) -> None:  # type: ignore[no-untyped-def]
    layouts = "[optimum, transformers.js, onnxruntime-genai]"
    out = tmp_path / "out"
    ended = edgedisp(
        "export",
        base,
        "--target",
        box(tmp_path, precision=precision, layouts=layouts),
        "--out",
        out,
        "--json",
    )
    assert ended.code == 0, ended
    said, manifest = json.loads(ended.out), json.loads((out / "manifest.json").read_text())
    assert manifest["files"] == list_files(out, without=("manifest.json", "README.md"))
    assert (
        manifest["size_bytes"]
        == said["size_bytes"]
        == sum(e["size_bytes"] for e in manifest["files"].values())
    )
    assert manifest["tokenizer_sha256"] == file_digest(base / "tokenizer.json")
    assert manifest["context"] == OnnxModel(out, 1).context == 64
    assert list(manifest["layouts"]) == said["layouts"] == ["onnxruntime-genai", "transformers.js", "optimum"]
    name, dtype = NAMES.get(precision, ("model", "fp32"))
    assert manifest["layouts"]["transformers.js"]["graph"] == f"onnx/{name}.onnx"
    assert f'dtype: "{dtype}"' in manifest["layouts"]["transformers.js"]["load"]
    grid = manifest["grid"]
    if precision == "fp32":
        assert grid is None
    else:
        assert (grid["bits"], grid["group"], grid["symmetric"], grid["head_bits"]) == (
            int(precision[3:]),
            32,
            False,
            8,
        )
        assert (grid["accuracy_level"], grid["method"]) == (4, "rtn")


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


def test_an_fp32_bundle_gives_the_models_logits(base: Path, tmp_path: Path, edgedisp) -> None:  # type: ignore[no-untyped-def]
    profile = box(tmp_path, precision="fp32", layouts="[onnxruntime-genai, transformers.js]")
    assert edgedisp("export", base, "--target", profile, "--out", tmp_path / "out").code == 0
    ids = np.arange(3, 63)[None]
    ours, theirs = OnnxModel(tmp_path / "out", 1), TorchModel(load(base))
    expected = theirs(ids, np.ones_like(ids))[:, -1:]  # a device needs the last token's alone
    np.testing.assert_allclose(ours(ids, np.ones_like(ids)), expected, atol=1e-4)


def test_the_same_export_twice_gives_the_same_bytes(base: Path, tmp_path: Path, edgedisp) -> None:  # type: ignore[no-untyped-def]
    for name in ("one", "two"):
        assert edgedisp("export", base, "--target", box(tmp_path), "--out", tmp_path / name).code == 0
    first, second = (
        list_files(tmp_path / "one", without=("README.md",)),
        list_files(tmp_path / "two", without=("README.md",)),
    )
    assert first == second


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "phone"], "target 'phone': no such device profile; did you mean 'phone-arm64'?"),
        (["--target", "absent.yaml"], "absent.yaml: no such file"),
        (["--layouts", "optimun"], "--layouts: 'optimun' is not known; did you mean 'optimum'?"),
        (["--layouts", ""], "--layouts: '' is not known"),
        (["--out", "{base}"], "exists already; choose another --out"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line_before_anything_is_written(
    words: list[str], said: str, base: Path, edgedisp
) -> None:  # type: ignore[no-untyped-def]
    before = left(base.parent)
    ended = edgedisp("export", base, *(word.format(base=base) for word in words))
    assert ended.code == 2
    assert said in ended.err and len(ended.err.strip().splitlines()) <= 2  # with the line that names the work
    assert "Traceback" not in ended.err and left(base.parent) == before


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("tokenizer.json", "no tokenizer.json; a bundle needs the fast form of the tokenizer"),
        ("config.json", "no model folder (config.json is missing)"),
        ("model.safetensors", "save_pretrained"),
    ],
)
def test_an_incomplete_model_folder_is_refused(gone: str, said: str, base: Path, edgedisp) -> None:  # type: ignore[no-untyped-def]
    (base / gone).unlink()
    ended = edgedisp("export", base)
    assert (ended.code, left(base.parent)) == (2, {"tiny"})
    assert said in ended.err


def test_a_profile_whose_keys_clash_is_refused_with_its_line(base: Path, tmp_path: Path, edgedisp) -> None:  # type: ignore[no-untyped-def]
    profile = box(tmp_path, precision="int8", quantize="{head_bits: 4}")
    ended = edgedisp("export", base, "--target", profile)
    assert ended.code == 2
    assert f"{profile}:7: quantize.head_bits: found 4, but int8 weights need a head of 8 bits" in ended.err


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


def test_an_interrupted_export_leaves_nothing(base: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "edgedisp",
        "export",
        base,
        "--target",
        box(tmp_path),
        "--out",
        tmp_path / "out",
    ]
    before = left(tmp_path)
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job may have it ignored
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=heed)
    deadline = time.monotonic() + 120
    while left(tmp_path) == before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert process.poll() is None  # it had begun, and was not done
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert left(tmp_path) == before


def test_bench_counts_weights_that_lie_with_another_layout(base: Path, tmp_path: Path, edgedisp) -> None:  # type: ignore[no-untyped-def]
    profile = box(tmp_path, layouts="[onnxruntime-genai, transformers.js]")
    assert edgedisp("export", base, "--target", profile, "--out", tmp_path / "out").code == 0
    short = ("--prompt", "4", "--generate", "2", "--repetitions", "1", "--threads", "1", "--json")
    timed = json.loads(edgedisp("bench", tmp_path / "out", *short).out)
    files = ("model.onnx", "onnx/model_q4.onnx_data")
    assert timed["devices"][0]["rows"][0]["weights_bytes"] == sum(
        (tmp_path / "out" / name).stat().st_size for name in files
    )
