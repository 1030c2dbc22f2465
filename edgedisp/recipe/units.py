"""Numbers as people write them in a recipe: `40k`, `200M`, `1.5B`, `5%`, `5e-5`, `1_000`, `100MB`.

YAML readers disagree about `5e-5` (text in YAML 1.1, a number in 1.2), and none knows `40k`. Text and numbers
go through `Decimal` here, so `0.1k` is exactly 100. Lower-case `m` is refused because it could be milli.
Each function raises ValueError with a hint on what would work.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

_NUMBER = re.compile(
    r"([+-]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9]{1,3})?) ?([kKMB%]?)"
)
_FACTORS = {
    "": Decimal(1),
    "k": Decimal(10**3),
    "K": Decimal(10**3),
    "M": Decimal(10**6),
    "B": Decimal(10**9),
}
_FACTORS["%"] = Decimal("0.01")
_SIZE = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?) ?([kMG]B|[KMG]iB)")
_BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_LONGEST = 40  # characters; more than any float64 or 64-bit integer needs


def read_number(value: object) -> float:
    """A finite float64 from a YAML value."""
    number = float(_exact(value, "a number, such as 0.1, 5e-5 or 5%"))
    if not math.isfinite(number):
        raise ValueError("the number is too large")
    return number


def read_whole(value: object) -> int:
    """An exact int below 10^18 from a YAML value: `40k` and `4e4` are whole, `40.5` is not."""
    exact = _exact(value, "a whole number, such as 40 or 40k")
    if exact and exact.adjusted() >= 18:
        raise ValueError("the number is too large")
    if exact != exact.to_integral_value():
        raise ValueError("needs a whole number")
    return int(exact)


def read_bytes(value: object) -> int:
    """Bytes from `100MB` (10^6), `95MiB` (2^20) or a plain number of at least 10^6, whose unit is sure."""
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    works = "a size such as 100MB; the units are kB, MB, GB, KiB, MiB and GiB"
    exact = _exact(match[1], works) * _BYTES[match[2]] if match else _exact(value, works)
    if not 1 <= exact < 10**15 or (match is None and exact < 10**6):
        raise ValueError(f"needs {works}")
    return int(exact)


def _exact(value: object, works: str) -> Decimal:
    is_number = isinstance(value, int | float | str) and not isinstance(value, bool)
    text = value.strip() if isinstance(value, str) else repr(value)
    match = _NUMBER.fullmatch(text) if is_number and len(text) <= _LONGEST else None
    if match:
        return Decimal(match[1].replace("_", "")) * _FACTORS[match[2]]
    if re.fullmatch(r"[+-]?[0-9]{1,3}(,[0-9]{3})+", text):
        raise ValueError(f"needs {works}; write it without commas, as {text.replace(',', '_')}")
    if re.fullmatch(r"[+-]?[0-9]+,[0-9]+", text):
        raise ValueError(f"needs {works}; write a decimal point, as {text.replace(',', '.')}")
    if re.fullmatch(r"[0-9.]+ ?m", text):
        raise ValueError(f"needs {works}; for millions write {text[:-1].rstrip()}M")
    raise ValueError(f"needs {works}")
