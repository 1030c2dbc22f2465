"""Numbers as people write them in a recipe: `40k`, `200M`, `1.5B`, `5%`, `5e-5`, `1_000`.

YAML readers disagree about `5e-5` (text in YAML 1.1, a number in 1.2), and none knows `40k`. Here text and
number take the same road: through `Decimal`, so that `0.1k` is exactly 100 and `1e-4` is exactly what was
typed. Lower-case `m` is refused, because it could be milli; so are infinities, which no key can use.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal, localcontext

# ASCII digits only: `\d` would take digits of every script. A short exponent keeps the arithmetic small.
_WRITTEN = re.compile(
    r"(?P<number>[+-]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9]{1,3})?)"
    r" ?(?P<unit>[kKMB%]?)"
)
_UNITS = {"": Decimal(1), "k": Decimal(1000), "K": Decimal(1000), "M": Decimal(10**6), "B": Decimal(10**9)}
_SIZE = re.compile(r"(?P<number>[0-9][0-9_]*(?:\.[0-9]+)?) ?(?P<unit>[kMG]B|[KMG]iB)")
_BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_UNITS["%"] = Decimal("0.01")
_LONGEST = 40
"""Characters in a written number; more than any float64 or 64-bit integer needs."""


def read_number(value: object) -> float:
    """A finite float64 from a YAML value. Raises ValueError with a hint (may be empty) if it is no number."""
    number = float(_exact(value))
    if not math.isfinite(number):
        raise ValueError("it is too large")
    return number


def read_whole(value: object) -> int:
    """An exact int from a YAML value: `40k` and `4e4` are whole, `40.5` is not. Raises ValueError."""
    exact = _exact(value)
    if exact and exact.adjusted() >= 18:
        raise ValueError("it is too large")
    if exact != exact.to_integral_value():
        raise ValueError("it is not whole")
    return int(exact)


def read_bytes(value: object) -> int:
    """Bytes from `100MB` (10^6), `0.1GB`, `95MiB` (2^20), or a plain number of bytes. Raises ValueError.

    A number without a unit below 10^6 is refused: no bundle is that small, so a unit was forgotten.
    """
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is not None:
        exact = _exact(match["number"]) * _BYTES[match["unit"]]
    else:
        if isinstance(value, str) and value.strip().lower().endswith(("b", "bit")):
            raise ValueError("the units are kB, MB, GB, KiB, MiB, GiB")
        exact = _exact(value)
        if exact < 10**6:
            raise ValueError("it has no unit")
    if exact < 1:
        raise ValueError("it is nothing")
    if exact.adjusted() >= 15:
        raise ValueError("it is too large")
    return int(exact)


def _exact(value: object) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("it is not finite")
    text = value.strip() if isinstance(value, str) else repr(value)
    match = _WRITTEN.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        raise ValueError(_hint(text))
    with localcontext(prec=2 * _LONGEST):
        return Decimal(match["number"].replace("_", "")) * _UNITS[match["unit"]]


def _hint(text: str) -> str:
    if len(text) > _LONGEST:
        return "it is too long"
    if _WRITTEN.fullmatch(text.replace(",", "")) and "," in text:
        return f"write it without commas, as {text.replace(',', '_')}"
    if text.endswith("m") and _WRITTEN.fullmatch(text[:-1]):
        return f"for millions write {text[:-1].rstrip()}M"
    return ""
