"""`browser` and `adb` devices: scripts stand for Chromium, adb and the phone; tests/slow has Chromium."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from shared_store import SharedStore
from tiny_bundle import order, tiny_bundles

from edgedisp.bench import adb, browser, devices
from edgedisp.bench.devices import BenchOptions
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import silent
from edgedisp.core.results import DeviceResult

PAGE = Path(__file__).resolve().parents[1] / "helpers" / "fake_page.py"
BATTERY = "  USB powered: true\n  status: {status}\n  level: {level}\n  scale: 100\n  temperature: 291\n"
THERMAL = (
    "Thermal Status: {thermal}\nCached temperatures:\n\tTemperature{{mValue=0.0, mType=3, mName=skin}}\n"
    "Current temperatures from HAL:\n\tTemperature{{mValue=48.5, mType=0, mName=CPU0}}\n"
    "\tTemperature{{mValue=31.5, mType=3, mName=skin}}\n"
)
PROPS = (
    "[ro.product.manufacturer]: [Testmaker]\n[ro.product.model]: [Test Phone 9]\n"
    "[ro.soc.manufacturer]: [Chipmaker]\n[ro.soc.model]: [CM1234]\n[ro.build.version.release]: [14]\n"
    "[ro.build.version.sdk]: [34]\n[ro.product.cpu.abi]: [arm64-v8a]\n"
)
OPTIONS = BenchOptions(prompt=6, generate=5, repetitions=2)


@pytest.fixture(scope="module")
def bundles(store: SharedStore) -> dict[str, Path]:
    return {"fp32": tiny_bundles(store)["fp32"]}


@pytest.fixture(autouse=True)
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of our own, so that this file needs no vendored libraries."""
    (tmp_path / "web" / "vendor" / "onnxruntime-web").mkdir(parents=True)
    (tmp_path / "web" / "index.html").touch()
    monkeypatch.setattr(browser, "data_folder", lambda name: tmp_path)


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the phone's shell finds; `adb` is a program that runs it here."""
    there = tmp_path / "phone"
    for name, text in {
        "getprop": 'cat "$PHONE/props"',
        "dumpsys": 'cat "$PHONE/$1"',
        "settings": "echo 0",
        "input": "exit 0",
        "am": 'while [ "$1" != -d ]; do shift; done\n'
        f'{sys.executable} {PAGE} "$2" $(cat "$PHONE/stop") >&2 &',
    }.items():
        program(there / name, text)
    state(there)
    (there / "props").write_text(PROPS)
    (there / "stop").touch()
    (there / "listed").write_text("* daemon started\nList of devices attached\nR5CT1  device model:SM_A520\n")
    adb_program = program(
        tmp_path / "adb",
        f'export PHONE={there} PATH={there}:$PATH\n[ "$1" = -s ] && shift 2\ncase "$1 $2" in\n'
        '"devices -l") cat "$PHONE/listed" ;;\n"shell -T") exec sh ;;\n'
        '"reverse --no-rebind") echo "cannot rebind existing socket" >&2; exit 1 ;;\n'
        '"reverse tcp:0") echo "${3#tcp:}"; echo "$3" > "$PHONE/reversed" ;;\n'
        '"reverse --list") echo "UsbFfs $(cat "$PHONE/reversed") x" ;;\n'
        '"reverse --remove") rm "$PHONE/reversed" ;;\n*) echo "adb: unknown $*" >&2; exit 1 ;;\nesac',
    )
    monkeypatch.setenv("EDGEDISP_ADB", str(adb_program))
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    return there


def state(there: Path, *, thermal: int = 0, level: int = 85, status: int = 3) -> None:
    (there / "battery").write_text(BATTERY.format(level=level, status=status))
    (there / "thermalservice").write_text(THERMAL.format(thermal=thermal))


def measure(name: str, bundles: dict[str, Path], options: BenchOptions = OPTIONS) -> DeviceResult:
    with devices.connect(devices.parse(name), bundles, options) as device:
        return device.measure(silent)


def test_a_browser_is_started_without_the_token_on_its_command_line(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chromium = (
        f'echo "$@" > {tmp_path}/words\nfor last; do :; done\n{sys.executable} {PAGE} "$last"\nexec sleep 30'
    )
    monkeypatch.setenv("CHROME", str(program(tmp_path / "chrome", chromium)))
    options = BenchOptions(6, 5, 2, requests={"fp32": [[([1], [2])]]})
    result = measure("browser", bundles, options)
    assert order(result) == ["fp32", "fp32"]
    assert result.rows[0].ttft_ms and result.rows[0].ttft_ms.value == 100.5
    assert result.answers == {"fp32": [[(-1.0, False)]]}
    assert result.machine["browser"]["program"] == "chrome" and result.machine["physical_cores"] >= 1
    assert all(turn["load_average_1m"] is not None for turn in result.repetitions)
    assert "127.0.0.1" not in (tmp_path / "words").read_text()
    assert not list(Path(tmp_path).glob("edgedisp-browser-*"))


def test_a_browser_that_ends_in_the_middle_leaves_what_was_timed(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chromium = f'for last; do :; done\n{sys.executable} {PAGE} "$last" 1\necho out of memory >&2; exit 9'
    monkeypatch.setenv("CHROME", str(program(tmp_path / "chrome", chromium)))
    result = measure("browser", bundles)
    assert result.lost and "the browser ended with code 9:\nout of memory" in result.lost
    assert order(result) == ["fp32"]


def test_no_browser_is_told_with_what_would_work(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHROME", "/nowhere/chrome")
    with pytest.raises(BadInput, match=r"\$CHROME names /nowhere/chrome"):
        measure("browser", bundles)
    monkeypatch.setenv("CHROME", "true")
    with pytest.raises(BadInput, match="--threads sweep: browser takes a number"):
        measure("browser", bundles, BenchOptions(threads="sweep"))
    monkeypatch.delenv("CHROME")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadInput, match="apt-get install chromium"):
        measure("browser", bundles)


def test_a_phones_page_gives_rows_with_what_the_phone_is_and_how_it_fared(
    bundles: dict[str, Path], phone: Path
) -> None:
    state(phone, thermal=2, level=15, status=2)
    result = measure("adb:R5CT1", bundles, OPTIONS)
    assert order(result) == ["fp32", "fp32"]
    machine = result.machine
    assert machine["phone"] == {
        "manufacturer": "Testmaker", "model": "Test Phone 9", "soc": "Chipmaker CM1234", "android": "14",
        "api": "34", "abi": "arm64-v8a", "measured_by": "the phone page in its browser",
    }  # fmt: skip
    assert machine["cpu"] == "Chipmaker CM1234" and machine["system"] == "Android 14 (API 34)"
    assert machine["memory_bytes"] > 0 and machine["browser"]["user_agent"] == "Test/1.0"
    assert machine["state"]["after"]["skin_temperature_c"] == 31.5
    assert result.load_average["before"] is not None
    said = "\n".join(result.warnings)
    for text in ("thermal status moderate before", "thermal status moderate after", "charged", "at 15 %"):
        assert text in said
    assert not (phone / "reversed").exists()  # its port was given back


def test_a_phone_that_goes_away_keeps_what_was_measured(
    bundles: dict[str, Path], phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adb, "LOOK_S", 0.1)
    (phone / "stop").write_text("1")

    def unplug(done: int, total: int, note: str) -> None:
        (phone / "reversed").unlink()

    with devices.connect(devices.parse("adb"), bundles, OPTIONS) as device:
        partial = device.measure(unplug)
    assert partial.lost and "not attached any more" in partial.lost
    assert order(partial) == ["fp32"] and partial.machine["phone"]["model"] == "Test Phone 9"
    assert partial.machine["state"]["after"] is None


def test_a_phone_without_a_browser_is_told(bundles: dict[str, Path], phone: Path) -> None:
    program(phone / "am", "echo 'Error: Activity not started, unable to resolve Intent'")
    with pytest.raises(BuildFailed, match="no browser opens the page there"):
        measure("adb", bundles)
    assert not (phone / "reversed").exists()


def test_none_several_a_stranger_and_one_that_is_not_allowed_are_told(
    bundles: dict[str, Path], phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match=r"adb:no-such: no-such is not attached; of these \(adb:R5CT1"):
        measure("adb:no-such", bundles)
    (phone / "listed").write_text("List of devices attached\na device\nb unauthorized\n")
    with pytest.raises(BadInput, match=r"2 are attached; of these \(adb:a \(device\), adb:b"):
        measure("adb", bundles)
    with pytest.raises(BadInput, match=r"b is unauthorized; .* allow this computer on its screen"):
        measure("adb:b", bundles)
    (phone / "listed").write_text("List of devices attached\n\n")
    with pytest.raises(BadInput, match=r"0 are attached.* turn on USB debugging"):
        measure("adb", bundles)
    monkeypatch.setenv("EDGEDISP_ADB", "no-such-adb -P 1")
    with pytest.raises(BadInput, match="there is no `no-such-adb` here; install adb"):
        measure("adb", bundles)


def test_what_a_phone_does_not_say_is_none_and_no_warning() -> None:
    silent_phone = adb.phone_state({})
    assert set(silent_phone.values()) == {None}
    assert not list(adb.state_warnings({"before": silent_phone, "after": silent_phone}))
    machine = adb.phone_machine({})
    assert machine["cpu"] is None and machine["physical_cores"] is None and machine["system"] == "Android"
    assert adb.count_cpus("0-3,6\n") == 5


def test_a_bundle_that_does_not_fit_into_the_phones_memory_is_refused(
    bundles: dict[str, Path], phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adb, "PAGE_BYTES", 1 << 50)
    with pytest.raises(BadInput, match="MiB of memory are free there, and fp32 takes at least"):
        measure("adb", bundles)
