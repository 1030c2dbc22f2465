"""What the phone page may send: progress, trouble, figures, scores. Everything else is refused.

A phone is not trusted: texts have a length and lose their control characters (they are printed on a
terminal), lists and numbers have bounds, unknown keys are errors. The page sends raw milliseconds; speeds are
computed in `page_plan.py`, as for every other device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

from edgedisp.bench.devices import Item


def printable(text: str) -> str:
    """The text with every character that could move a terminal's cursor replaced by a space."""
    return "".join(character if character.isprintable() else " " for character in text)


Text = Annotated[str, StringConstraints(max_length=500), AfterValidator(printable)]
Number = Annotated[float, Field(ge=0.0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=1 << 50)]
Score = tuple[Annotated[float, Field(ge=-1e9, le=0.01, allow_inf_nan=False)], bool]
"""Sum of log-probabilities (rounding may leave it above 0), and whether each token was the likeliest."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DeviceFacts(_Strict):
    """What the browser tells of itself and of the phone; None where it does not."""

    user_agent: Text
    model: Text | None
    platform: Text | None
    cores: Count | None
    device_memory_gb: Number | None  # rounded and capped at 8 by the browser
    simd: bool
    isolated: bool  # cross-origin isolated: threads are possible, and the clock has its finest steps
    secure: bool
    threads: Annotated[int, Field(ge=1, le=256)]
    clock_resolution_ms: Number
    runtime: Text
    width: Count
    height: Count


class Loaded(_Strict):
    """What opening a bundle told. load_s: one entry for each time it was opened."""

    label: Text
    load_s: Annotated[list[Number], Field(min_length=1, max_length=2000)]
    layers: Count
    vocab_size: Count
    kv_cache_bytes_per_position: Count


class Repetition(_Strict):
    """One prompt and its tokens, timed in the worker. hidden: the page was not in front meanwhile."""

    label: Text
    repetition: Count
    turn: Count
    ttft_ms: Number
    token_ms: Annotated[list[Number], Field(min_length=1, max_length=8192)]
    tokens: Annotated[list[Count], Field(min_length=1, max_length=8192)]
    wall_s: Number
    heap_bytes: Count | None
    hidden: bool


class _Upload(_Strict):
    run: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]  # one page load


class Figures(_Upload):
    """All that was measured so far; each sending replaces the one before."""

    kind: Literal["figures"]
    complete: bool
    held_open: bool  # all bundles were open at the same time; else each was loaded again for its turn
    device: DeviceFacts
    loaded: Annotated[list[Loaded], Field(max_length=64)]
    repetitions: Annotated[list[Repetition], Field(max_length=2000)]


class Scores(_Upload):
    """Answers to some items that were to be scored. first: place of the first among the bundle's items."""

    kind: Literal["scores"]
    label: Text
    first: Count
    answers: Annotated[list[Annotated[list[Score], Field(max_length=1000)]], Field(max_length=100)]


class Step(_Upload):
    """A line of progress."""

    kind: Literal["step"]
    done: Count
    total: Count
    note: Text


class Trouble(_Upload):
    """The page could not go on."""

    kind: Literal["trouble"]
    message: Text


Upload = Figures | Scores | Step | Trouble
UPLOAD: TypeAdapter[Upload] = TypeAdapter(Annotated[Upload, Field(discriminator="kind")])


class PendingScores:
    """The answers of one page so far."""

    def __init__(self, requests: Mapping[str, Sequence[Item]]) -> None:
        self._requests = requests
        self.answers: dict[str, list[list[tuple[float, bool]]]] = {label: [] for label in requests}

    def add(self, upload: Scores) -> None:
        """Keep what continues what is known: a piece may be sent again, and one after a gap is left."""
        known = self.answers.get(upload.label)
        if known is not None and upload.first <= len(known):
            known += upload.answers[len(known) - upload.first :]

    @property
    def complete(self) -> bool:
        """Whether every item of every bundle is answered."""
        return all(len(self.answers[label]) == len(items) for label, items in self._requests.items())
