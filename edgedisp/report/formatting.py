"""How figures are written: digits, units, intervals. Each function is also a filter of the templates.

A missing figure is an en dash, never 0. An interval decides the digits of its estimate: two in the
half-width. Sizes are decimal megabytes. Minus is the ASCII hyphen, so tables can be parsed; the HTML page
swaps in the typographic one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from edgedisp.core.results import Estimate

MISSING = "–"


def fixed(value: float | None, decimals: int, sign: str = "") -> str:
    """`value` with that many decimals and thousands separated; `-0.00` is written `0.00`. sign: `+` is
    written before positive values, too."""
    if value is None:
        return MISSING
    text = f"{value:{sign},.{decimals}f}"
    return text if text.strip("+-0.,") else text.lstrip("+-")


def significant(value: float | None, digits: int = 4) -> str:
    """A score or a rate: `digits` significant digits, scientific beyond a million or below 0.0001."""
    if value is None:
        return MISSING
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-4:
        return f"{value:.2e}"
    return fixed(value, max(0, digits - 1 - math.floor(math.log10(size))) if size else 2)


def small(value: float | None) -> str:
    """A small quantity (a divergence, a learning rate): three significant digits."""
    return MISSING if value is None else f"{value:.3g}"


def decimals_for(half_width: float | None, fallback: int) -> int:
    """Decimals that show two digits of an interval's half-width, between 0 and 6."""
    if not half_width or half_width <= 0:
        return fallback
    return min(6, max(0, 1 - math.floor(math.log10(half_width))))


def estimate_texts(estimate: Estimate, scale: float = 1.0, signs: bool = False) -> tuple[str, str, str]:
    """(value, interval `low, high`, half-width) of an estimate times `scale`; the last two may be empty.

    signs: for differences, a plus before positive figures.
    """
    sign, value = "+" if signs else "", estimate.value
    if value is None:
        return MISSING, "", ""
    if estimate.low is None or estimate.high is None or estimate.half_width is None:
        text = significant(scale * value)
        return f"+{text}" if signs and value > 0 else text, "", ""
    half = scale * estimate.half_width
    decimals = decimals_for(half, 2 if abs(scale * value) >= 1 else 4)
    low, high = (fixed(scale * limit, decimals, sign) for limit in (estimate.low, estimate.high))
    return fixed(scale * value, decimals, sign), f"{low}, {high}", fixed(half, decimals)


def format_estimate(
    estimate: Estimate | None, scale: float = 1.0, *, signs: bool = False, short: bool = False
) -> str:
    """`0.523 [0.511, 0.535]`; short: `0.523 ±0.012`."""
    if estimate is None:
        return MISSING
    value, interval, half = estimate_texts(estimate, scale, signs)
    if not interval:
        return value
    return f"{value} ±{half}" if short else f"{value} [{interval}]"


def p_value(value: float | None) -> str:
    """Three decimals, `<0.001` below."""
    return MISSING if value is None else "<0.001" if value < 0.0005 else f"{value:.3f}"


def count(value: float | None) -> str:
    return MISSING if value is None else f"{round(value):,}"


def about(number: float) -> str:
    """A count rounded up, with two significant digits."""
    whole = math.ceil(number)
    return f"{round(whole, min(0, 2 - len(str(whole)))):,}"


def relative(nats: float) -> float:
    """The change of a perplexity in percent, of a change in loss."""
    return 100 * math.expm1(nats)


def megabytes(size_bytes: float | None) -> str:
    return MISSING if size_bytes is None else fixed(size_bytes / 1e6, 1 if size_bytes < 1e8 else 0)


def percent(share: float | None, decimals: int = 1) -> str:
    """A share in [0, 1] as `12.3 %`."""
    return MISSING if share is None else f"{fixed(100 * share, decimals)} %"


def duration(seconds: float | None) -> str:
    """`0.4 s`, `42 s`, `6 min 05 s`, `2 h 10 min`."""
    if seconds is None:
        return MISSING
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def short_hash(value: object) -> str:
    return str(value)[:12] if value else "not recorded"


def plural(number: int, word: str) -> str:
    """`1 item`, `2 items`."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def setting(value: Any) -> str:
    """A value of a recipe or a machine."""
    if value is None or value in ([], ()):
        return MISSING
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested mappings as (dotted path, value); a list is a leaf."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def bits(precision: str) -> float:
    """Bits of a weight, from the precision's name; `torch`, the original, sorts above fp32."""
    digits = re.search(r"\d+", precision)
    return 33.0 if precision == "torch" else float(digits.group()) if digits else 32.5


def label(precision: str) -> str:
    """The name of a precision in tables: `torch fp32`, `onnx fp32`, `int8`, `int4`."""
    return {"torch": "torch fp32", "fp32": "onnx fp32"}.get(precision, precision)


def typographic(text: str) -> str:
    """For HTML: the minus sign before figures, and no line break before a percent sign or an arrow."""
    return re.sub(r"(?<=\d) (?=%)| (?=[↑↓])", "\u00a0", re.sub(r"(?<![\w.])-(?=\d)", "−", text))
