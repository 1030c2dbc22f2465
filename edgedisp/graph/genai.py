"""Runs a bundle with onnxruntime-genai, to see that the runtime on the device opens it and says the same.

Left out: sampling and chat, which `edgedisp/chat.py` does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BuildFailed


class GenaiModel:
    """A bundle opened by onnxruntime-genai. BuildFailed with the runtime's reason if it does not open."""

    def __init__(self, bundle: Path, stop_id: int | None = None) -> None:
        """`stop_id` ends a text as well; the bundle's own end-of-text ids stay (overlays add to a list)."""
        import onnxruntime_genai

        self._runtime: Any = onnxruntime_genai
        getattr(onnxruntime_genai, "disable_telemetry_events", lambda: None)()
        try:
            config = onnxruntime_genai.Config(str(bundle))
            if stop_id is not None:
                config.overlay(json.dumps({"model": {"eos_token_id": [stop_id]}}))
            self._model = onnxruntime_genai.Model(config)
        except Exception as error:  # genai raises bare RuntimeError and its own types
            raise BuildFailed(f"{bundle}: onnxruntime-genai cannot open it: {error}") from error

    def greedy(self, ids: list[int], max_new_tokens: int) -> list[int]:
        """The most likely next tokens; a stop token ends it and is the last of the result."""
        options = self._runtime.GeneratorParams(self._model)
        options.set_search_options(max_length=len(ids) + max_new_tokens, do_sample=False)
        generator = self._runtime.Generator(self._model, options)
        generator.append_tokens(ids)
        new: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            new.append(int(generator.get_next_tokens()[0]))
        return new

    def tokenizer(self) -> Any:
        """The bundle's tokenizer as genai reads it: `encode(text)`, `decode(ids)`."""
        return self._runtime.Tokenizer(self._model)
