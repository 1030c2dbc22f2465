"""A stand-in for the device end of adb, for the tests of `adb` devices: the real adb program talks to it.

It speaks enough of the protocol for shell commands (with and without exit codes), `adb reverse` and the
connections that come back through it. What stands for the phone is in `android_phone.py`: a folder, whose
programs come before the system's. Nothing of USB, authorisation, bionic or SELinux is in it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

COMMANDS = (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"WRTE", b"CLSE")
CNXN, AUTH, OPEN, OKAY, WRTE, CLSE = (int.from_bytes(name, "little") for name in COMMANDS)
MODEL = "Test Phone 9"
VERSION, LARGEST = 0x01000001, 256 * 1024
STDIN, STDOUT, STDERR, EXIT, STDIN_ENDS = range(5)


class Link:
    """One connection of an adb server."""

    def __init__(self, phone: Adbd, connection: socket.socket) -> None:
        self.phone, self.connection = phone, connection
        self._sending = threading.Lock()
        self.streams: dict[int, Stream] = {}

    def send(self, command: int, first: int, second: int, data: bytes = b"") -> None:
        check = sum(data) if command in (CNXN, AUTH) else 0  # later ones go unchecked in this version
        head = struct.pack("<6I", command, first, second, len(data), check, command ^ 0xFFFFFFFF)
        with self._sending, contextlib.suppress(OSError):
            self.connection.sendall(head + data)

    def serve(self) -> None:
        """Until the connection ends."""
        incoming = self.connection.makefile("rb")
        with contextlib.suppress(OSError), self.connection, incoming:
            while len(head := incoming.read(24)) == 24:
                command, first, second, size = struct.unpack("<6I", head)[:4]
                self._take(command, first, second, incoming.read(size))
        for stream in list(self.streams.values()):
            stream.end()

    def _take(self, command: int, theirs: int, ours: int, data: bytes) -> None:
        if command == CNXN and self.phone.authorised:
            told = f"ro.product.name=t;ro.product.model={MODEL};ro.product.device=t;"
            banner = f"device::{told}features={','.join(self.phone.features)}"
            self.send(CNXN, VERSION, LARGEST, banner.encode())
        elif (command == CNXN and not self.phone.authorised) or (command == AUTH and theirs == 2):
            self.send(AUTH, 1, 0, bytes(20))  # a token to sign; no signature is good enough
        elif command == OPEN:
            stream = self.stream()
            stream.theirs = theirs
            self.send(OKAY, stream.ours, theirs)
            stream.may_send.release()
            serve = self.phone.service(data.rstrip(b"\0").decode())
            threading.Thread(target=_served, args=(serve, stream), daemon=True).start()
        elif ours in self.streams and command == OKAY:
            self.streams[ours].theirs = theirs
            self.streams[ours].may_send.release()
        elif ours in self.streams and command == WRTE:
            self.streams[ours].incoming.put(data)
        elif ours in self.streams and command == CLSE:
            self.streams[ours].end()

    def stream(self) -> Stream:
        """A new one, not yet agreed on."""
        made = Stream(self, next(self.phone.numbers))
        self.streams[made.ours] = made
        return made


def _served(serve: Callable[[Stream], None], stream: Stream) -> None:
    with contextlib.suppress(BrokenPipeError, OSError):
        serve(stream)
    stream.close()


class Stream:
    """A stream of a link: each piece that is sent waits until the one before was taken."""

    def __init__(self, link: Link, ours: int) -> None:
        self.link, self.ours, self.theirs = link, ours, 0
        self.incoming: queue.Queue[bytes | None] = queue.Queue()
        self.may_send = threading.Semaphore(0)
        self.ended = False

    def read(self) -> bytes | None:
        """The next piece; None at the end."""
        data = self.incoming.get()
        if data is not None:
            self.link.send(OKAY, self.ours, self.theirs)
        return data

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), LARGEST):
            self.may_send.acquire()
            if self.ended:
                self.may_send.release()
                raise BrokenPipeError
            self.link.send(WRTE, self.ours, self.theirs, data[start : start + LARGEST])

    def end(self) -> None:
        """The other side has closed it."""
        self.ended = True
        self.incoming.put(None)
        self.may_send.release()
        self.link.streams.pop(self.ours, None)

    def close(self) -> None:
        if not self.ended:
            self.link.send(CLSE, self.ours, self.theirs)
            self.end()


@dataclass
class Adbd:
    """A phone that adb can connect to at `port`."""

    folder: Path
    authorised: bool = True
    features: tuple[str, ...] = ("shell_v2",)
    listeners: dict[int, tuple[int, socket.socket]] = field(default_factory=dict)  # port there -> port here
    asked: list[str] = field(default_factory=list)  # services, in order
    carried: int = 0  # connections that came back through a reverse port
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # of streams

    def __post_init__(self) -> None:
        self._links: list[Link] = []
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._door.getsockname()[1]
        threading.Thread(target=self._answer, daemon=True).start()

    @property
    def device(self) -> str:
        return f"adb:127.0.0.1:{self.port}"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link = Link(self, self._door.accept()[0])
                self._links.append(link)
                threading.Thread(target=link.serve, daemon=True).start()

    def cut(self) -> None:
        """The phone is gone: nothing answers any more, and its ports are closed."""
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()
        for link in self._links:
            with contextlib.suppress(OSError):
                link.connection.shutdown(socket.SHUT_RDWR)
        for port in list(self.listeners):
            self._unlisten(port)

    def service(self, name: str) -> Callable[[Stream], None]:
        self.asked.append(name)
        kind, _, rest = name.partition(":")
        if kind == "reverse":
            return lambda stream: stream.write(self._reverse(stream, rest))
        if kind.startswith("shell,v2"):
            return lambda stream: self._shell(stream, rest)
        if kind in ("shell", "exec"):
            return lambda stream: self._plain_shell(stream, rest)
        return lambda stream: None

    # ------------------------------------------------------------------ shells

    def _started(self, command: str, stderr: int) -> subprocess.Popen[bytes]:
        cache = str(self.home / ".cache")
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        own = {"PATH": path, "HOME": str(self.home), "XDG_CACHE_HOME": cache, "PHONE": str(self.folder)}
        return subprocess.Popen(
            ["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            cwd=self.home, env={**os.environ, **own}, start_new_session=True,
        )  # fmt: skip

    def _plain_shell(self, stream: Stream, command: str) -> None:
        with self._started(command, subprocess.STDOUT) as process:
            out, _ = process.communicate()
        stream.write(out)

    def _shell(self, stream: Stream, command: str) -> None:
        """Packets {kind, length, bytes} both ways, the exit code as the last one."""
        process = self._started(command, subprocess.PIPE)
        sending = threading.Lock()

        def told(kind: int, pipe: object) -> None:
            with contextlib.suppress(BrokenPipeError, OSError):
                while data := pipe.read1(1 << 16):  # type: ignore[attr-defined]
                    with sending:
                        stream.write(struct.pack("<BI", kind, len(data)) + data)

        pumps = [threading.Thread(target=told, args=one, daemon=True)
                 for one in ((STDOUT, process.stdout), (STDERR, process.stderr))]  # fmt: skip
        threading.Thread(target=_fed, args=(stream, process), daemon=True).start()
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        code = process.wait()
        stream.write(struct.pack("<BIB", EXIT, 1, code if code >= 0 else 128 - code))

    # ------------------------------------------------------------------ reverse

    def _reverse(self, stream: Stream, wanted: str) -> bytes:
        what, _, rest = wanted.partition(":")
        if what == "list-forward":
            lines = [f"UsbFfs tcp:{there} tcp:{here}\n" for there, (here, _) in self.listeners.items()]
            return _counted("".join(lines))
        if what == "killforward":
            port = int(rest.removeprefix("tcp:"))
            if port not in self.listeners:
                return b"FAIL" + _counted(f"listener '{rest}' not found")
            self._unlisten(port)
            return b"OKAY"
        if what != "forward":
            return b"FAIL" + _counted(f"unknown: {what}")
        kept = rest.startswith("norebind:")
        there, here = (int(end.removeprefix("tcp:")) for end in rest.removeprefix("norebind:").split(";"))
        if there in self.listeners and kept:
            return b"FAIL" + _counted("cannot rebind existing socket")
        try:
            listener = socket.create_server(("127.0.0.1", there))
        except OSError as error:
            return b"FAIL" + _counted(f"cannot bind listener: {error.strerror}")
        port = listener.getsockname()[1]
        self.listeners[port] = here, listener
        threading.Thread(target=self._carry, args=(stream.link, listener, here), daemon=True).start()
        return b"OKAY" + (_counted(str(port)) if there == 0 else b"")

    def _unlisten(self, port: int) -> None:
        listener = self.listeners.pop(port)[1]
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()

    def _carry(self, link: Link, listener: socket.socket, here: int) -> None:
        """Each connection to a reverse port becomes a stream that this side opens."""
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                self.carried += 1
                stream = link.stream()
                link.send(OPEN, stream.ours, 0, f"tcp:{here}\0".encode())
                threading.Thread(target=_down, args=(stream, connection), daemon=True).start()
                threading.Thread(target=_up, args=(stream, connection), daemon=True).start()


def _down(stream: Stream, connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while (data := stream.read()) is not None:
            connection.sendall(data)
        connection.shutdown(socket.SHUT_RDWR)


def _up(stream: Stream, connection: socket.socket) -> None:
    with contextlib.suppress(OSError), connection:
        while data := connection.recv(1 << 16):
            stream.write(data)
    stream.close()


def _fed(stream: Stream, process: subprocess.Popen[bytes]) -> None:
    """The packets of a shell's stdin."""
    assert process.stdin is not None
    held = b""
    with contextlib.suppress(OSError), process.stdin:
        while (data := stream.read()) is not None:
            held += data
            while len(held) >= 5:
                kind, size = struct.unpack("<BI", held[:5])
                if len(held) < 5 + size:
                    break
                if kind == STDIN_ENDS:
                    return
                if kind == STDIN:
                    process.stdin.write(held[5 : 5 + size])
                    process.stdin.flush()
                held = held[5 + size :]


def _counted(text: str) -> bytes:
    return f"{len(text):04x}{text}".encode()
