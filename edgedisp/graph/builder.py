"""Families that this package does not write itself, through onnxruntime-genai's model builder.

The builder reads the same model folder and leaves a bundle with the same interface. It prints and logs a
lot, which is kept and shown only if it fails; its head dimension is a symbol in the graph, which is
replaced by the number, as transformers.js needs.

Left out: what the builder offers beyond dense text decoders (vision, audio, mixtures of experts).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx

from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.graph import layout
from edgedisp.graph.writer import GRAPH

# Families whose graph was compared with torch on a tiny random model (builder 0.18, transformers 5.23): the
# logits are equal to 1e-4, phi's to 2e-3. Not among them: olmo (off by 4), nemotron (1e-2), gemma2 (its cache
# holds the window alone, which only genai handles).
FAMILIES = ("ernie4_5", "gemma", "granite", "phi", "phi3", "smollm3")


def build(model_folder: Path, out: Path, *, family: str, threads: int, progress: Progress = silent) -> None:
    """Build an fp32 bundle in `out`. BuildFailed with the builder's reason, or where a package is missing."""
    progress(0, 1, f"onnxruntime-genai's builder writes {family}")
    said = io.StringIO()
    try:
        with tempfile.TemporaryDirectory() as cache, _quiet(said):
            from onnxruntime_genai.models.builder import create_model, parse_extra_options

            place = ("", str(model_folder), str(out), "fp32", "cpu", cache)
            create_model(*place, **parse_extra_options(*place, []))
    except ModuleNotFoundError as error:
        raise BuildFailed(
            f"{model_folder}: family {family!r} needs onnxruntime-genai's builder, which needs {error.name}; "
            "install edgedisp[bench]"
        ) from error
    except Exception as error:  # whatever the builder meets in a model is a failure of this build
        last = " / ".join(said.getvalue().strip().splitlines()[-3:])
        raise BuildFailed(
            f"{model_folder}: onnxruntime-genai's builder could not write family {family!r}: "
            f"{type(error).__name__}: {error}. It said last: {last}"
        ) from error
    _name_head_dimension(out)
    layout.copy_files(model_folder, out)
    layout.set_end_ids(out)  # the builder knows the configured ones and the tokenizer's eos alone
    layout.set_threads(out, threads)
    progress(1, 1, "graph written")


@contextlib.contextmanager
def _quiet(said: io.StringIO) -> Iterator[None]:
    """Send prints and log lines of the builder to `said`."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = [logging.StreamHandler(said)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


def _name_head_dimension(bundle: Path) -> None:
    """Give the caches' last dimension its number."""
    config = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))
    model = onnx.load(bundle / GRAPH, load_external_data=False)
    for value in [*model.graph.input, *model.graph.output]:
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = config["model"]["decoder"]["head_size"]
    (bundle / GRAPH).write_bytes(model.SerializeToString())
