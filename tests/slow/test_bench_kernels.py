"""Logits under two kinds of kernels: the comparison by its formulas, and the emulated ARM64 itself."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_bundle import RUNNER, tiny_bundles

from edgedisp.bench import arm64_emulated, devices, kernels
from edgedisp.bench.devices import Wanted
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import silent


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_bundles(tmp_path_factory.getbasetemp())


def test_divergence_is_its_formula_by_loops() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 7)), rng.normal(size=(5, 7))
    total, same = 0.0, 0
    for left, right in zip(a, b):
        p = [math.exp(x) / sum(math.exp(y) for y in left) for x in left]
        q = [math.exp(x) / sum(math.exp(y) for y in right) for x in right]
        total += sum(x * math.log(x / y) for x, y in zip(p, q))
        same += left.tolist().index(max(left)) == right.tolist().index(max(right))
    found = kernels.divergence(a, b)
    assert found["mean_kl"] == pytest.approx(total / 5) and found["top1_agreement"] == same / 5
    assert kernels.divergence(a, a + 3.0)["mean_kl"] == pytest.approx(0.0, abs=1e-12)


def test_perplexity_is_its_formula_by_loops() -> None:
    rng = np.random.default_rng(1)
    logits, ids = rng.normal(size=(4, 6)), [0, 3, 5, 1]
    losses = [math.log(sum(math.exp(x) for x in row)) - row[to] for row, to in zip(logits, ids[1:])]
    assert kernels.perplexity(logits, ids) == pytest.approx(math.exp(sum(losses) / 3))


def test_an_exact_copy_computes_in_floats_and_the_original_is_untouched(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    before = (bundles["int4"] / "model.onnx").read_bytes()
    assert kernels.exact_copy(bundles["int4"], tmp_path / "exact")
    graph = onnx.load(str(tmp_path / "exact" / "model.onnx"), load_external_data=False)
    levels = [a.i for n in graph.graph.node for a in n.attribute if a.name == "accuracy_level"]
    assert levels and set(levels) == {0}
    assert (bundles["int4"] / "model.onnx").read_bytes() == before
    assert not kernels.exact_copy(bundles["fp32"], tmp_path / "none")


def wanted(**changes: Any) -> Wanted:
    ids = [3, 7, 11, 2, 9, 30, 5, 8]
    options: dict[str, Any] = {"runner": RUNNER, "cache": Path("unused"), "ids": lambda _: ids}
    return Wanted(**{**options, **changes})


def root_with(program: Path, out: Path) -> Path:
    """What --setup leaves, with `program` for its Python."""
    (out / "root" / "usr" / "bin").mkdir(parents=True)
    (out / "site").mkdir()
    (out / "root" / "usr" / "bin" / "python3.11").symlink_to(program)
    return out


def test_an_emulator_of_this_very_machine_finds_no_difference(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    """The road through three processes and back, with a script for qemu that drops qemu's options."""
    qemu = tmp_path / "qemu"
    qemu.write_text(f'#!/bin/sh\nshift 5\nexec "{sys.executable}" "$@"\n')
    qemu.chmod(0o755)
    root = root_with(Path(sys.executable), tmp_path / "arm64")
    device = arm64_emulated.Emulated("arm64-emulated", str(qemu), root, dict(bundles), wanted())
    steps: list[str] = []
    found = device.measure(lambda done, total, note: steps.append(note))
    assert "rows" not in found and "decode" not in str(found)  # never a speed
    rows = found["logits"]["rows"]
    assert [row["label"] for row in rows] == [label for label in bundles for _ in range(3)]
    for row in rows:
        assert row["kl_to_x86"] == 0.0 and row["top1_agreement"] == 1.0
        assert (row["kl_to_exact"] is None) == (row["label"] != "int4")
    assert len({row["perplexity"] for row in rows if row["label"] == "fp32"}) == 1
    assert "fp32: ARM64 without KleidiAI" in steps


def test_an_emulator_that_dies_fails_with_what_it_said(bundles: dict[str, Path], tmp_path: Path) -> None:
    dying = tmp_path / "qemu"
    dying.write_text("#!/bin/sh\necho uncaught target signal 4 >&2\nexit 132\n")
    dying.chmod(0o755)
    root = root_with(Path(sys.executable), tmp_path / "arm64")
    device = arm64_emulated.Emulated("arm64-emulated", str(dying), root, bundles, wanted())
    with pytest.raises(BuildFailed, match="ended with code 132: uncaught target signal 4"):
        device.measure(silent)


def test_without_emulator_or_its_python_the_way_to_get_them_is_told(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = devices.parse("arm64-emulated")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with (
        pytest.raises(BadInput, match="apt-get install qemu-user-static"),
        devices.opened(address, bundles, wanted(cache=tmp_path)),
    ):
        pass
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    with (
        pytest.raises(BadInput, match="--setup fetches it"),
        devices.opened(address, bundles, wanted(cache=tmp_path)),
    ):
        pass


@pytest.mark.emulated
@pytest.mark.skipif(
    not any(shutil.which(name) for name in arm64_emulated.QEMU), reason="no qemu-aarch64 (qemu-user-static)"
)
def test_arm64_kernels_agree_with_x86_on_fp32_weights(bundles: dict[str, Path]) -> None:
    from edgedisp.data import cache_folder

    address = devices.parse("arm64-emulated")
    chosen = {name: bundles[name] for name in ("fp32", "int4")}
    asked = wanted(cache=cache_folder(), setup=True)
    with devices.opened(address, chosen, asked) as device:
        rows = device.measure(silent)["logits"]["rows"]
    by_kind = {(row["label"], row["kernels"]): row for row in rows}
    fp32 = by_kind["fp32", arm64_emulated.ARM]
    assert fp32["kl_to_x86"] < 1e-9 and fp32["top1_agreement"] == 1.0
    int4 = by_kind["int4", arm64_emulated.ARM]
    assert 0 < int4["kl_to_exact"] < 1
