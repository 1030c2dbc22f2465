"""`browser` and `adb` devices: scripts stand for Chromium, adb and the phone; tests/slow has Chromium."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fake_page import figures, post
from shared_store import SharedStore
from tiny_bundle import Bundles, order, tiny_bundles

from edgedisp.bench import adb, devices, page_server
from edgedisp.bench.browser import BrowserPage
from edgedisp.bench.devices import BenchOptions
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import silent
from edgedisp.core.results import DeviceResult

PAGE = Path(__file__).resolve().parents[1] / "helpers" / "fake_page.py"
BATTERY = "  USB powered: true\n  status: {status}\n  level: {level}\n  scale: 100\n  temperature: 291\n"
THERMAL = "Thermal Status: {thermal}\nCached temperatures:\n"
PROPS = (
    "[ro.product.manufacturer]: [Testmaker]\n[ro.product.model]: [Test Phone 9]\n"
    "[ro.soc.manufacturer]: [Chipmaker]\n[ro.soc.model]: [CM1234]\n[ro.build.version.release]: [14]\n"
    "[ro.build.version.sdk]: [34]\n[ro.product.cpu.abi]: [arm64-v8a]\n"
)
LAST = "for last; do :; done\n"  # the address, last of the arguments
OPTIONS = BenchOptions(prompt=6, generate=5, repetitions=2)


@pytest.fixture(scope="module")
def bundles(store: SharedStore) -> dict[str, Path]:
    return {"fp32": tiny_bundles(store)["fp32"]}


@pytest.fixture(autouse=True)
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that needs no vendored libraries."""
    (tmp_path / "web" / "vendor" / "onnxruntime-web").mkdir(parents=True)
    (tmp_path / "web" / "index.html").touch()
    monkeypatch.setattr(page_server, "WEB", tmp_path / "web")


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the phone's shell finds; `adb` is a program that runs it here."""
    folder = tmp_path / "phone"
    for name, text in {
        "getprop": 'cat "$PHONE/props"',
        "dumpsys": 'cat "$PHONE/$1"',
        "input": "exit 0",
        "am": 'while [ "$1" != -d ]; do shift; done\n'
        f'{sys.executable} {PAGE} "$2" $(cat "$PHONE/stop") >&2 &',
    }.items():
        program(folder / name, text)
    state(folder)
    (folder / "props").write_text(PROPS)
    (folder / "stop").touch()
    (folder / "attached").write_text("echo device")
    adb_program = program(
        tmp_path / "adb",
        f'export PHONE={folder} PATH={folder}:$PATH\n[ "$1" = -s ] && shift 2\ncase "$1 $2" in\n'
        '"get-state ") sh "$PHONE/attached" ;;\n"shell -T") exec sh ;;\n'
        '"reverse --no-rebind") echo "cannot rebind existing socket" >&2; exit 1 ;;\n'
        '"reverse tcp:0") echo "${3#tcp:}"; echo "$3" > "$PHONE/reversed" ;;\n'
        '"reverse --list") echo "UsbFfs $(cat "$PHONE/reversed") x" ;;\n'
        '"reverse --remove") rm "$PHONE/reversed" ;;\n*) echo "adb: unknown $*" >&2; exit 1 ;;\nesac',
    )
    monkeypatch.setenv("EDGEDISP_ADB", str(adb_program))
    return folder


def state(phone: Path, *, thermal: int = 0, level: int = 85, status: int = 3) -> None:
    (phone / "battery").write_text(BATTERY.format(level=level, status=status))
    (phone / "thermalservice").write_text(THERMAL.format(thermal=thermal))


def measure(name: str, bundles: Bundles, options: BenchOptions = OPTIONS) -> DeviceResult:
    with devices.connect(name, bundles, options) as device:
        return device.measure(silent)


def test_a_browser_is_started_without_the_token_on_its_command_line(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chromium = f'echo "$@" > {tmp_path}/words\n{LAST}{sys.executable} {PAGE} "$last"\nexec sleep 30'
    monkeypatch.setenv("CHROME", str(program(tmp_path / "chrome", chromium)))
    result = measure("browser", bundles, BenchOptions(6, 5, 2, requests={"fp32": [[([1], [2])]]}))
    assert order(result) == ["fp32", "fp32"] and result.answers == {"fp32": [[(-1.0, False)]]}
    assert result.rows[0].ttft_ms and result.rows[0].ttft_ms.value == 100.5
    assert result.machine["physical_cores"] >= 1
    assert all(turn["load_average_1m"] is not None for turn in result.repetitions)
    assert "127.0.0.1" not in (tmp_path / "words").read_text()
    # ended in the middle: what was timed stays
    chromium = f'{LAST}{sys.executable} {PAGE} "$last" 1\necho out of memory >&2; exit 9'
    program(tmp_path / "chrome", chromium)
    result = measure("browser", bundles)
    assert result.lost and "the browser ended with code 9:\nout of memory" in result.lost
    assert order(result) == ["fp32"] and not list(tmp_path.glob("edgedisp-browser-*"))


class Lossy(BrowserPage):
    """A page whose second upload is lost; the clock counts the readings."""

    @contextmanager
    def open(self, server: page_server.PageServer) -> Iterator[None]:
        plan = json.loads(self.plan.resources["plan.json"].body)
        for turns in (1, 3, 4):
            post(server.url, figures(plan, turns))
        self.clock = count(1)
        yield

    def gone(self) -> None:
        return None

    def sensors(self) -> dict[str, Any]:
        return {"clock_mhz": next(self.clock)}

    def state(self) -> None:
        return None


def test_a_lost_upload_shifts_no_reading_of_the_clock(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHROME", "true")
    result = Lossy(bundles, BenchOptions(6, 5, 4)).measure(silent)
    assert [turn.get("clock_mhz") for turn in result.repetitions] == [1, None, 2, 3]


def test_without_a_browser_the_error_names_what_would_work(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chrome, threads, message in (
        ("/nowhere/chrome", None, r"looked for /nowhere/chrome\); install one, such as `apt-get install chr"),
        ("true", "sweep", "--threads sweep: browser takes a number"),
    ):
        monkeypatch.setenv("CHROME", chrome)
        with pytest.raises(BadInput, match=message):
            measure("browser", bundles, BenchOptions(threads=threads))  # type: ignore[arg-type]


def test_a_phone_gives_rows_its_hardware_and_its_state(bundles: Bundles, phone: Path) -> None:
    state(phone, thermal=2, level=15, status=2)
    result = measure("adb:R5CT1", bundles, OPTIONS)
    assert order(result) == ["fp32", "fp32"]
    machine = result.machine
    assert machine["phone"] == {
        "manufacturer": "Testmaker", "model": "Test Phone 9", "maker": "Chipmaker", "chip": "CM1234",
        "board": None, "android": "14", "measured_by": "the phone page in its browser",
    }  # fmt: skip
    assert machine["cpu"] == "Chipmaker CM1234" and machine["system"] == "Android 14"
    assert machine["memory_bytes"] > 0 and machine["browser"]["user_agent"] == "Test/1.0"
    assert machine["state"]["after"]["battery_temperature_c"] == 29.1
    warnings = "\n".join(result.warnings)
    for text in ("thermal status moderate before", "thermal status moderate after", "charging", "at 15 %"):
        assert text in warnings
    assert not (phone / "reversed").exists()  # its port was given back


def test_a_phone_that_goes_away_keeps_what_was_measured(
    bundles: Bundles, phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adb, "LOOK_S", 0.1)
    (phone / "stop").write_text("1")

    def unplug(done: int, total: int, note: str) -> None:
        (phone / "reversed").unlink()

    with devices.connect("adb", bundles, OPTIONS) as device:
        partial = device.measure(unplug)
    assert partial.lost and "not attached any more" in partial.lost
    assert order(partial) == ["fp32"] and partial.machine["phone"]["model"] == "Test Phone 9"
    assert partial.machine["state"]["after"] is None


def test_a_phone_without_a_browser_or_memory_is_an_error(
    bundles: Bundles, phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(phone / "am", "echo 'Error: Activity not started, unable to resolve Intent'")
    with pytest.raises(BuildFailed, match="no browser opens the page there"):
        measure("adb", bundles)
    assert not (phone / "reversed").exists()
    monkeypatch.setattr(adb, "PAGE_BYTES", 1 << 50)
    with pytest.raises(BadInput, match="MiB of memory are free there, and fp32 takes at least"):
        measure("adb", bundles)


def test_a_phone_that_takes_no_commands_is_an_error_in_adbs_words(
    bundles: Bundles, phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (phone / "attached").write_text("echo 'error: device unauthorized.' >&2; exit 1")
    with pytest.raises(BadInput, match=r"adb:b: .* error: device unauthorized\..* turn on USB debugging"):
        measure("adb:b", bundles)
    monkeypatch.setenv("EDGEDISP_ADB", "no-such-adb -P 1")
    with pytest.raises(BadInput, match="there is no `no-such-adb` here; install adb"):
        measure("adb", bundles)


def test_what_a_phone_does_not_report_is_none_and_no_warning(bundles: Bundles, phone: Path) -> None:
    for name in ("getprop", "dumpsys"):
        (phone / name).unlink()
    result = measure("adb", bundles)
    assert result.machine["phone"]["model"] is None and result.machine["system"] == "Android"
    assert result.machine["state"]["before"]["battery_percent"] is None
    assert [warning for warning in result.warnings if "battery" in warning or "thermal" in warning] == []
