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
from edgedisp.bench.devices import Address, parse, parse_all
from edgedisp.core.errors import BadInput


def test_devices_are_taken_apart() -> None:
    assert parse("local") == Address("local", "local")
    assert parse("ssh://Pi") == Address("ssh://Pi", "ssh", "Pi")
    assert parse("ssh://me@pi.local:2222") == Address("ssh://me@pi.local:2222", "ssh", "pi.local", "me", 2222)
    assert parse("adb") == Address("adb", "adb")
    for serial in ("R5CT123", "127.0.0.1:15555", "[::1]:5555", "adb-x._adb-tls-connect._tcp"):
        assert parse(f"adb:{serial}") == Address(f"adb:{serial}", "adb", serial=serial)
    six = parse("ssh://me@[fe80::1%eth0]:22")
    assert (six.host, six.user, six.port) == ("fe80::1%eth0", "me", 22)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is not known; (choices: local, ssh://USER@HOST[:PORT], adb[:SERIAL], browser)"),
        ("locl", "did you mean 'local'?"),
        ("shh://pi", "did you mean 'ssh://USER@HOST[:PORT]'?"),
        ("ssh", "write ssh://USER@HOST[:PORT]"),
        *((f"ssh://{rest}", "write ssh://") for rest in (
            "", "me@", "@pi", "me:secret@pi", "pi/home", "pi:99999", "pi:port", "-oProxy=x", "-x@pi",
            "pi;reboot", "pi?x", "[fe80::1", "me@-x",
        )),
        ("local://here", "takes no address"),
        ("adb:", "is not a serial; write adb[:SERIAL]"),
        *((f"adb:{serial}", "is not a serial") for serial in ("-s", "//phone", "a b")),
        ("abd", "did you mean 'adb[:SERIAL]'?"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_what_would(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=rf"^.*{re.escape(message)}.*$"):
        parse(name)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_bad_input(text: str) -> None:
    for name in (text, f"ssh://{text}", f"adb:{text}"):
        try:
            address = parse(name)
        except BadInput:
            continue
        assert not any((word or "").startswith("-") for word in (address.host, address.user, address.serial))


def test_no_device_and_the_same_device_twice_are_refused() -> None:
    for names, message in (([], "--device takes one of local"), (["local"] * 2, "local: is named twice")):
        with pytest.raises(BadInput, match=message):
            parse_all(names)


def test_every_kind_has_its_file_with_an_opener_and_is_imported_only_when_used() -> None:
    modules = {f"edgedisp.bench.{devices.MODULES.get(kind, kind)}" for kind in devices.FORMS}
    assert all(callable(import_module(module).connect) for module in modules)
    tree = ast.parse(Path(devices.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & modules


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "lokal"], "did you mean 'local'?"),
        (["--threads", "many"], "neither a whole number of at least 1 nor `sweep`"),
        (["--threads", "0"], "neither a whole number"),
        (["--write-threads"], "give --threads sweep too"),
        (["--threads", "sweep", "--write-threads", "--device", "local", "--device", "ssh://pi"], "name one"),
        (["--html", "/no/such/folder/x.html"], "name a file"),
    ],
)
def test_options_that_cannot_work_end_with_2(  # type: ignore[no-untyped-def]
    tmp_path: Path, edgedisp, words: list[str], message: str
) -> None:
    (tmp_path / "model.onnx").touch()
    result = edgedisp("bench", tmp_path, *words)
    assert result.code == 2 and message in result.err, result
