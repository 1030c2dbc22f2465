"""Lines of bitsandbytes and peft that say nothing to whoever trains here, kept off the screen.

Two log lines of bitsandbytes:
- While it is imported (transformers' Trainer does that) on a CPU with bf16 instructions: that an optional
  kernel for 4-bit inference is not installed. `load_quantized` turns that road off anyway.
- At every forward pass of an int8 layer: that its input is cast to float16, which is how it works.

Two warnings of peft:
- that it reads a property of the model that transformers has renamed;
- that an adapter trained over a quantized GPT-2 (linear layers) comes back to its Conv1D layers, which it
  then handles.

The filters are there while a block runs and look for these texts alone; levels, other lines and other
people's handlers stay as they are.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_WARNINGS = ("fan_in_fan_out", "`is_gradient_checkpointing` is deprecated")  # how they begin
_NOTES = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
}


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Drop bitsandbytes' two lines inside the block."""

    def worth_showing(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(_NOTES[record.name])

    loggers = [logging.getLogger(name) for name in _NOTES]
    for logger in loggers:
        logger.addFilter(worth_showing)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(worth_showing)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Drop all four inside the block."""
    with quiet_bitsandbytes(), warnings.catch_warnings():
        for beginning in _WARNINGS:
            warnings.filterwarnings("ignore", message=beginning)
        yield
