"""What the phone page may send: progress, trouble, figures, scores. Everything else is refused.

A phone is not trusted: every text has a length and loses its control characters (it is printed on a
terminal), every list and number has bounds, unknown keys are errors. The page sends raw times alone; speeds
are computed here, so that they mean the same as on every other device.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

MOST_TOKENS = 8192
MOST_REPETITIONS = 2000
MOST_BUNDLES = 64


def printable(text: str) -> str:
    """The text with every character that could move a terminal's cursor replaced by a space."""
    return "".join(character if character.isprintable() else " " for character in text)


RunId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
Text = Annotated[str, StringConstraints(max_length=500), AfterValidator(printable)]
Milliseconds = Annotated[float, Field(ge=0.0, le=3.6e6, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0.0, le=86400.0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
Count = Annotated[int, Field(ge=0, le=1 << 31)]
Score = tuple[Annotated[float, Field(ge=-1e9, le=0.01, allow_inf_nan=False)], bool]
"""Sum of log-probabilities (rounding may leave it above 0), and whether each token was the likeliest."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Device(_Strict):
    """What the browser tells of itself and of the phone; None where it does not."""

    user_agent: Text
    model: Text | None
    platform: Text | None
    cores: Count | None
    device_memory_gb: Annotated[float, Field(ge=0.0, le=4096.0, allow_inf_nan=False)] | None
    """Rounded and capped at 8 by the browser."""
    simd: bool
    isolated: bool
    """Cross-origin isolated: threads are possible, and the clock has its finest steps."""
    secure: bool
    threads: Annotated[int, Field(ge=1, le=256)]
    clock_resolution_ms: Milliseconds
    runtime: Text
    width: Count
    height: Count


class Loaded(_Strict):
    """What opening a bundle told."""

    label: Text
    load_s: Annotated[list[Seconds], Field(min_length=1, max_length=MOST_REPETITIONS)]
    """Session creation, the reading of the kept file included; one entry for each time it was opened."""
    runtime_load_s: Seconds
    """Fetching and compiling the WebAssembly runtime: not in load_s, as imports are not."""
    download_s: Seconds | None
    """None: nothing was downloaded, all was kept from before."""
    layers: Annotated[int, Field(ge=1, le=1000)]
    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)]
    kv_cache_bytes_per_position: Bytes


class Repetition(_Strict):
    """One prompt and its tokens, timed in the worker."""

    label: Text
    repetition: Count
    turn: Count
    ttft_ms: Annotated[float, Field(gt=0.0, le=3.6e6, allow_inf_nan=False)]
    token_ms: Annotated[list[Milliseconds], Field(min_length=1, max_length=MOST_TOKENS)]
    tokens: Annotated[list[Count], Field(min_length=1, max_length=MOST_TOKENS)]
    wall_s: Seconds
    heap_bytes: Bytes | None
    """Size of the WebAssembly heap: it only grows, so this is its peak."""
    hidden: bool
    """The page was not in front at some time meanwhile: browsers slow such pages down."""


class Figures(_Strict):
    """All that was measured so far; each sending replaces the one before."""

    kind: Literal["figures"]
    run: RunId
    complete: bool
    held_open: bool
    """All bundles were open at the same time; else each was loaded again for its turn."""
    device: Device
    loaded: Annotated[list[Loaded], Field(max_length=MOST_BUNDLES)]
    repetitions: Annotated[list[Repetition], Field(max_length=MOST_REPETITIONS)]


class Scores(_Strict):
    """Answers to some items that were to be scored, in their order (page_scores.py)."""

    kind: Literal["scores"]
    run: RunId
    label: Text
    first: Count
    """Place of the first of these items among the bundle's."""
    answers: Annotated[list[Annotated[list[Score], Field(max_length=1000)]], Field(max_length=100)]


class Step(_Strict):
    """A line of progress."""

    kind: Literal["step"]
    run: RunId
    done: Count
    total: Count
    note: Text


class Trouble(_Strict):
    """The page could not go on."""

    kind: Literal["trouble"]
    run: RunId
    message: Text


Upload = Figures | Scores | Step | Trouble

UPLOAD: TypeAdapter[Upload] = TypeAdapter(Annotated[Upload, Field(discriminator="kind")])
