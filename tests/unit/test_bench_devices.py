"""Devices by name: what `--device` accepts, and what it says of the rest."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedisp.bench import devices
from edgedisp.bench.devices import kind_of
from edgedisp.core.errors import BadInput

GOOD = [
    *("local", "browser", "ssh://Pi", "ssh://me@pi.local:2222", "ssh://me@[fe80::1%eth0]:22", "adb"),
    *("adb:R5CT123", "adb:127.0.0.1:15555", "adb:[::1]:5555", "adb:adb-x._adb-tls-connect._tcp"),
]
BAD = {
    "": "(choices: local, llama.cpp, ssh://USER@HOST[:PORT], adb[:SERIAL], browser)",
    "locl": "write 'local'",
    "local://here": "write 'local'",
    "shh://pi": "write 'ssh://USER@HOST[:PORT]'",
    "ssh": "write 'ssh://USER@HOST[:PORT]'",
    "abd": "write 'adb[:SERIAL]'",
}
BAD |= dict.fromkeys(("adb:", "adb:-s", "adb://phone", "adb:a b"), "write 'adb[:SERIAL]'")
HOSTS = "|me@|@pi|me:secret@pi|pi/home|pi:port|-oProxy=x|-x@pi|pi;reboot|pi?x|[fe80::1|me@-x"
BAD |= {f"ssh://{host}": "write 'ssh://" for host in HOSTS.split("|")}


def test_names_are_devices_or_refused_with_what_would_work() -> None:
    for name in GOOD:
        assert kind_of(name) == re.split(":", name)[0]
    for name, message in BAD.items():
        with pytest.raises(BadInput, match=rf"^.*{re.escape(message)}.*$"):
            kind_of(name)


@given(st.text(max_size=30))
def test_no_part_of_a_device_looks_like_an_option(text: str) -> None:
    for name in (text, f"ssh://{text}", f"adb:{text}"):
        try:
            kind_of(name)
        except BadInput:
            continue
        assert not re.search(r"(^|[:/@])-", name)


def test_every_kind_has_its_file_and_is_imported_only_when_used() -> None:
    modules = {f"edgedisp.bench.{name}" for name in devices.MODULES.values()}
    assert all(callable(import_module(module).connect) for module in modules)
    tree = ast.parse(Path(devices.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & modules


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "lokal"], "write 'local'"),
        (["--device", "local", "--device", "local"], "named twice"),
        (["--threads", "many"], "neither a whole number from 1 to 1024 nor `sweep`"),
        (["--threads", "0"], "neither a whole number"),
        (["--html", "/no/such/folder/x.html"], "name a file"),
    ],
)
def test_options_that_cannot_work_end_with_2(  # type: ignore[no-untyped-def]
    tmp_path: Path, edgedisp, words: list[str], message: str
) -> None:
    (tmp_path / "model.onnx").touch()
    result = edgedisp("bench", tmp_path, *words)
    assert result.code == 2 and message in result.err, result
