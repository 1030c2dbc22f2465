"""`--device adb`: the real adb program against a stand-in for the phone (`adbd.py`, `android_phone.py`)."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import android_phone
import pytest
from android_phone import MODEL, AndroidPhone
from test_phone_page import WEB, chromium
from tiny_bundle import RUNNER, recompute, tiny_bundles

from edgedisp.bench import adb_client, adb_page, android, devices
from edgedisp.bench.devices import DeviceLost, Wanted
from edgedisp.bench.page_bundle import prompt_ids, read_bundles
from edgedisp.core.errors import BadInput
from edgedisp.evaluate.score import loglikelihoods
from edgedisp.graph.session import OnnxModel

needs_adb = pytest.mark.skipif(android_phone.MISSING is not None, reason=str(android_phone.MISSING))
needs_page = [
    needs_adb,
    pytest.mark.skipif(chromium() is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(not (WEB / "vendor").is_dir(), reason="needs the page's libraries: make web"),
]
OPTIONS = {"prompt": 6, "generate": 5, "repetitions": 2, "threads": 1}
WORDS = ["--prompt", "6", "--generate", "5", "--repetitions", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"fp32": tiny_bundles(tmp_path_factory.getbasetemp())["fp32"]}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with android_phone.server(tmp_path_factory.mktemp("adb")) as found:
        yield found


@pytest.fixture
def adb(command: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """$EDGEDISP_ADB, with no phone attached before and after."""
    monkeypatch.setenv("EDGEDISP_ADB", command)
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    yield command
    android_phone.disconnect(command)


@pytest.fixture
def phone(adb: str, tmp_path: Path) -> Iterator[AndroidPhone]:
    """One attached phone."""
    with android_phone.phone(tmp_path / "phone") as found:
        android_phone.connect(adb, found)
        yield found


def wanted(**changes: Any) -> Wanted:
    fixed: dict[str, Any] = {"runner": RUNNER, "cache": Path("unused"), "ids": lambda _: []}
    return Wanted(**{**OPTIONS, **fixed, **changes})


def refusal(name: str, bundles: dict[str, Path], **changes: Any) -> str:
    with (
        pytest.raises(BadInput) as caught,
        devices.opened(devices.parse(name), bundles, wanted(**changes)),
    ):
        pass
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{name}: ")
    return str(caught.value)


def left(phone: AndroidPhone, patience_s: float = 10.0) -> list[Path]:
    """What is in the home folder there; a far end whose connection broke takes a moment to clean up."""
    deadline = time.monotonic() + patience_s
    while (found := list(phone.home.rglob("*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def tokens(result: dict[str, Any]) -> dict[str, list[int]]:
    return {repetition["label"]: repetition["tokens"] for repetition in result["repetitions"]}


class TestPage:
    pytestmark = needs_page

    def test_the_page_in_its_browser_gives_rows_through_the_reverse_port(  # type: ignore[no-untyped-def]
        self, phone: AndroidPhone, bundles: dict[str, Path], tmp_path: Path, edgedisp
    ) -> None:
        page = tmp_path / "devices.html"
        bundle = bundles["fp32"]
        ended = edgedisp("bench", bundle, "--device", "adb", *WORDS, "--html", page, "--json")
        assert ended.code == 0, ended
        (found,) = json.loads(ended.out)["devices"]
        assert (found["device"], found["kind"]) == ("adb", "adb")
        (row,) = found["rows"]
        assert row["label"] == "fp32" and row["repetitions"] == 2 and row["decode_tokens_per_s"] > 0
        vocabulary = row["shape"]["vocab_size"]
        assert tokens(found)["fp32"] == recompute(bundle, prompt_ids(vocabulary, 6, 0), 5)
        opened = (phone.folder / "opened").read_text()
        there = re.match(r"http://127\.0\.0\.1:(\d+)/[\w-]{22}/\?run=bench\n", opened)
        asked = [name for name in phone.asked if name.startswith("reverse:")]
        here = re.search(r";tcp:(\d+)$", asked[0])
        assert there and here and there[1] != here[1] and phone.carried > 0
        assert asked[-1] == f"reverse:killforward:tcp:{there[1]}" and phone.listeners == {}
        machine = found["machine"]
        assert machine["phone"] == {
            "manufacturer": "Testmaker", "model": MODEL, "soc": "Chipmaker CM1234", "android": "14",
            "api": "34", "abi": "arm64-v8a", "measured_by": "the phone page in its browser",
        }  # fmt: skip
        assert machine["cpu"] == "Chipmaker CM1234" and machine["system"] == "Android 14 (API 34)"
        assert machine["memory_bytes"] > 0 and machine["browser"]["isolated"]
        assert found["load_average"]["before"] is not None
        assert machine["state"]["after"]["battery_percent"] == 85
        text = page.read_text()
        assert f"adb ({MODEL})" in text and "85 %, discharging, 29.1 °C" in text
        assert "KEYCODE_WAKEUP" in (phone.folder / "input").read_text()

    def test_a_phone_that_is_lost_keeps_what_was_measured(
        self, phone: AndroidPhone, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(adb_page, "LOOK_S", 0.1)

        def cut(done: int, total: int, note: str) -> None:
            if "repetition 3" in note:
                phone.cut()

        address = devices.parse(phone.device)
        with (
            devices.opened(address, bundles, wanted(repetitions=50)) as device,
            pytest.raises(DeviceLost, match="not attached any more") as caught,
        ):
            device.measure(cut)
        partial = caught.value.partial
        assert 2 <= len(partial["order"]) < 50 and not partial["complete"] and partial["lost"]
        assert partial["machine"]["phone"]["model"] == MODEL
        assert partial["machine"]["state"]["after"] is None

    def test_a_phone_without_a_browser_is_told_and_its_port_given_back(
        self, phone: AndroidPhone, bundles: dict[str, Path]
    ) -> None:
        (phone.folder / "browser").unlink()
        address = devices.parse("adb")
        with (
            devices.opened(address, bundles, wanted()) as device,
            pytest.raises(RuntimeError, match="no browser opens the page there"),
        ):
            device.measure(lambda *_: None)
        assert phone.listeners == {}
        assert "--threads sweep" in str(refusal_of_sweep(bundles))

    def test_the_page_scores_there_too(self, phone: AndroidPhone, bundles: dict[str, Path]) -> None:
        items = [[((3, 4, 5), (9, 10)), ((3, 4, 5), (11,))], [((7, 8), (9, 10)), ((7, 8), (11,))]]
        asked = wanted(requests={"fp32": items})
        with devices.opened(devices.parse("adb"), bundles, asked) as device:
            found = device.measure(lambda *_: None)
        model = OnnxModel(bundles["fp32"], threads=1)
        expected = [[one.sum_logprob for one in loglikelihoods(model, item)] for item in items]
        assert [[logprob for logprob, _ in item] for item in found["answers"]["fp32"]] == [
            pytest.approx(item, abs=1e-4) for item in expected
        ]
        assert phone.listeners == {}


def refusal_of_sweep(bundles: dict[str, Path]) -> BadInput:
    with (
        pytest.raises(BadInput) as caught,
        devices.opened(devices.parse("adb"), bundles, wanted(sweep=True)),
    ):
        pass
    return caught.value


@needs_adb
def test_a_python_in_termux_that_adb_may_enter_runs_the_runner_and_leaves_nothing(
    phone: AndroidPhone, bundles: dict[str, Path]
) -> None:
    (phone.folder / "debuggable").touch()
    phone.state(thermal=2, level=15, status=2)
    with devices.opened(devices.parse(phone.device), bundles, wanted()) as device:
        found = device.measure(lambda *_: None)
    assert [row["label"] for row in found["rows"]] == ["fp32"]
    vocabulary = found["rows"][0]["shape"]["vocab_size"]
    assert tokens(found)["fp32"] == recompute(bundles["fp32"], prompt_ids(vocabulary, 6, 0), 5)
    assert found["machine"]["phone"]["measured_by"] == "the runner in its Python"
    assert found["machine"]["packages"]["onnxruntime"]
    told = "\n".join(found["warnings"])
    for said in ("thermal status moderate before", "thermal status moderate after", "charged", "at 15 %"):
        assert said in told
    assert left(phone) == []


@needs_adb
def test_a_runner_whose_phone_is_lost_keeps_what_was_measured_and_leaves_nothing(
    phone: AndroidPhone, bundles: dict[str, Path]
) -> None:
    (phone.folder / "debuggable").touch()

    def cut(done: int, total: int, note: str) -> None:
        if "tokens/s" in note and done == 1 + 1:
            phone.cut()

    with (
        devices.opened(devices.parse("adb"), bundles, wanted()) as device,
        pytest.raises(DeviceLost) as caught,
    ):
        device.measure(cut)
    assert caught.value.partial["order"] == ["fp32"]
    assert caught.value.partial["lost"] and left(phone) == []


@needs_adb
def test_a_named_python_that_is_not_there_is_told(phone: AndroidPhone, bundles: dict[str, Path]) -> None:
    assert "starts no Python /no/such" in refusal("adb", bundles, python="/no/such")


@needs_adb
def test_an_old_phone_without_a_clean_pipe_is_for_the_page_alone(
    adb: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    with android_phone.phone(tmp_path / "old", features=()) as old:
        android_phone.connect(adb, old)
        assert adb_client.find_phone("adb", None).shell("echo said; exit 7 | cat") == "said\n"
        assert "--remote-python needs Android 7" in refusal("adb", bundles, python="python3")


@needs_adb
def test_bytes_and_exit_codes_pass_through_the_shell(phone: AndroidPhone) -> None:
    found = adb_client.find_phone("adb", None)
    every = bytes(range(256)) * 4096 + b"\n~.\n\r\n\x04"
    done = subprocess.run(found.reach("cat; echo said >&2; exit 7"), input=every, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, every, b"said\n")


@needs_adb
def test_a_port_that_is_taken_on_the_phone_gives_way_to_a_free_one(phone: AndroidPhone) -> None:
    found = adb_client.find_phone("adb", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        taken = free.getsockname()[1]
    with found.port_that_leads_here(5, taken) as first, found.port_that_leads_here(6, first) as second:
        assert first == taken
        assert second != first and found.leads_here(first) and found.leads_here(second)
    assert phone.listeners == {} and not found.leads_here(first)


@needs_adb
def test_none_several_and_a_stranger_are_told(adb: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    assert "no phone is attached; plug it in" in refusal("adb", bundles)
    with (
        android_phone.phone(tmp_path / "a") as one,
        android_phone.phone(tmp_path / "b", authorised=False) as other,
    ):
        for found in (one, other):
            android_phone.connect(adb, found)
        told = refusal("adb", bundles)
        assert "2 devices are attached" in told and f"{one.device} (Test Phone 9)" in told
        assert f"{other.device} (unauthorized)" in told
        assert "allow USB debugging for this computer" in refusal(other.device, bundles)
        stranger = refusal("adb:no-such", bundles)  # adb lists in an order of its own
        assert "no-such is not attached (attached: adb:" in stranger and one.device in stranger
        assert adb_client.find_phone("adb", one.device.removeprefix("adb:")).name == "adb"


def test_a_machine_without_adb_is_told(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEDISP_ADB", "no-such-adb -P 1")
    assert "there is no `no-such-adb` here; install adb" in refusal("adb", bundles)


def test_what_adb_lists_is_read_with_its_states() -> None:
    text = (
        "* daemon not running; starting now at tcp:5037\n* daemon started successfully\n"
        "List of devices attached\n"
        "R5CT123 device usb:1-1 product:x model:SM_A520 device:y transport_id:1\n"
        "emulator-5554          offline transport_id:2\n"
        "0123 no permissions (user in plugdev group; are your udev rules wrong?); see [http://x] usb:1-2\n"
        "192.0.2.7:5555\tunauthorized\n\n"
    )
    found = [(one.serial, one.state, one.model) for one in adb_client.listing(text)]
    assert found == [
        ("R5CT123", "device", "SM A520"),
        ("emulator-5554", "offline", ""),
        ("0123", "no permissions", ""),
        ("192.0.2.7:5555", "unauthorized", ""),
    ]
    assert adb_client.listing("List of devices attached\n\n") == []


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ("error: device 'x' not found", "it is not attached any more"),
        ("adb: device offline", "it does not answer"),
        ("adb: cannot connect to daemon at tcp:5037: refused", "adb's server does not start"),
        ("first\nsomething new", "code 1: something new"),
        ("", "it said nothing"),
    ],
)
def test_what_adb_says_is_explained_in_one_line(said: str, meaning: str) -> None:
    assert meaning in adb_client.explain(1, said) and "\n" not in adb_client.explain(1, said)
    assert adb_client.explain(0, "") == "the connection to the phone broke"


def test_a_phone_that_tells_nothing_leaves_gaps_and_no_warnings() -> None:
    silent = android.state({})
    assert {name: value for name, value in silent.items() if value is not None} == {"powered_by": []}
    assert android.warnings(silent, None) == [] and android.warnings(silent, silent) == []
    assert set(android.identity("").values()) == {None}


def test_the_state_is_read_from_what_dumpsys_tells() -> None:
    found = android.state(
        {
            "battery": android_phone.BATTERY.format(status=2, level=43),
            "thermal": android_phone.THERMAL.format(thermal=1),
            "saver": "1\n",
        }
    )
    assert found == {
        "battery_percent": 43, "battery_status": "charging", "powered_by": ["USB"],
        "battery_temperature_c": 29.1, "thermal_status": "light", "skin_temperature_c": 31.5,
        "battery_saver": True,
    }  # fmt: skip
    assert android.cpus("0-3,6\n") == [0, 1, 2, 3, 6] and android.cpus(None) == []


def test_memory_that_cannot_hold_a_bundle_is_refused_and_a_narrow_one_told(bundles: dict[str, Path]) -> None:
    served = read_bundles(bundles)
    with pytest.raises(BadInput, match=r"100 MiB of memory are free there, and .* takes at least 15"):
        adb_page.tight("adb", served, 100 << 20)
    assert "Android ends other apps" in adb_page.tight("adb", served, 200 << 20)[0]
    assert adb_page.tight("adb", served, 4 << 30) == adb_page.tight("adb", served, None) == []
