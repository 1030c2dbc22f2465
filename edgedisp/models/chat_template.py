"""Renders chat templates, which are programs of strangers, in a process with limits.

The process is this file run as a script, which imports nothing of edgedisp. It renders by transformers' own
code, or by onnxruntime-genai, which takes minutes for some long templates. An endless loop, a string of
gigabytes or a recursion without end cost that process alone. It is started once, serves all templates, and
ends with its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

SECONDS = 5.0  # of the processor for one conversation; an honest template takes milliseconds
MEMORY_BYTES = 2 << 30  # of addresses; 140 MB are there before a template
CHARACTERS = 4_000_000  # of a rendered conversation


class Renderer:
    """The process that renders; another one is started after a template used up its limits."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def start(self) -> subprocess.Popen[str]:
        """Start it where it does not run: it imports its libraries meanwhile."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # each takes addresses
                start_new_session=True,  # Ctrl-C ends an answer, not this
            )
        return self._process

    def render(self, **request: Any) -> str:
        """The text of one conversation: by transformers' `render_jinja_template` with these arguments, or,
        with `folder`, `messages` and `tools`, by onnxruntime-genai for a bundle. ValueError with the
        template's own reason if there is none, TimeoutError if the limits did not suffice."""
        (text,) = self.render_all([request])
        if isinstance(text, ValueError):
            raise text
        return text

    def render_all(self, requests: Sequence[dict[str, Any]], **shared: Any) -> list[str | ValueError]:
        """The same for many; a conversation that has no text gets the reason. shared: arguments of all."""
        with self._lock:
            process = self.start()
            content = {"seconds": SECONDS, "shared": shared, "requests": list(requests)}
            line = ""
            if process.stdin and process.stdout:
                with suppress(BrokenPipeError):
                    print(json.dumps(content, default=str), file=process.stdin, flush=True)
                line = process.stdout.readline()
            if not line:
                process.wait()
                limits = f"{SECONDS:g} seconds and {MEMORY_BYTES >> 30} GiB of memory"
                raise TimeoutError(f"it does not end within {limits}, or recurses too deep")
        answers = json.loads(line)
        return [ValueError(answer["error"]) if "error" in answer else answer["text"] for answer in answers]


RENDERER = Renderer()


def _render(folder: str | None = None, messages: Any = None, tools: Any = None, **arguments: Any) -> str:
    if folder is None:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(tools=tools, **arguments)
        return str(rendered[0][0])
    import onnxruntime_genai

    getattr(onnxruntime_genai, "disable_telemetry_events", lambda: None)()
    tokenizer = onnxruntime_genai.Tokenizer(folder)
    options = {"add_generation_prompt": True} | ({"tools": json.dumps(tools)} if tools else {})
    return str(tokenizer.apply_chat_template(json.dumps(messages), **options))


def _serve() -> None:
    """Answer requests, a line of JSON each, until standard input ends."""
    import resource

    import transformers.utils.chat_template_utils  # before the limits  # noqa: F401

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        content, answers = json.loads(line), list[dict[str, str]]()
        for request in content["requests"]:
            signal.setitimer(signal.ITIMER_PROF, content["seconds"])  # ends this process, also inside C code
            try:
                text = _render(**content["shared"], **request)
                if len(text) > CHARACTERS:
                    raise ValueError(f"it gives more than {CHARACTERS:,} characters")
                answers.append({"text": text})
            except (MemoryError, RecursionError):
                return
            except Exception as error:
                answers.append({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
