"""How figures are written: digits, units, intervals.

Rules: a missing figure is an en dash, never 0; a difference always has a sign and as many digits as its
interval deserves (two in the half-width); minus is the ASCII hyphen, so that tables can be parsed back (the
HTML page swaps in the typographic one); sizes are decimal megabytes.
"""

from __future__ import annotations

import math
import re

MISSING = "–"


def fixed(value: float | None, decimals: int) -> str:
    """`value` with that many decimals and thousands separated; `-0.00` is written `0.00`."""
    if value is None:
        return MISSING
    text = f"{value:,.{decimals}f}"
    return text[1:] if text.startswith("-") and not text.strip("-0.,") else text


def signed(value: float | None, decimals: int) -> str:
    """Like `fixed`, with `+` for positive values."""
    text = fixed(value, decimals)
    return f"+{text}" if value is not None and value > 0 and text.strip("0.,") else text


def figure(value: float | None) -> str:
    """A score or a rate: about four significant digits, scientific beyond a million."""
    if value is None:
        return MISSING
    size = abs(value)
    if size >= 1e6:
        return f"{value:.2e}"
    return fixed(value, 0 if size >= 1000 else 1 if size >= 100 else 2)


def small(value: float | None) -> str:
    """A small quantity (a divergence, a learning rate): three significant digits."""
    if value is None:
        return MISSING
    return "0" if value == 0 else f"{value:.3g}"


def p_value(value: float) -> str:
    """Three decimals, `<0.001` below."""
    return "<0.001" if value < 0.0005 else f"{value:.3f}"


def count(value: float | None) -> str:
    """A count with thousands separated."""
    return MISSING if value is None else f"{round(value):,}"


def megabytes(size_bytes: float | None) -> str:
    """Bytes as decimal MB."""
    return MISSING if size_bytes is None else fixed(size_bytes / 1e6, 1 if size_bytes < 1e8 else 0)


def percent(share: float | None, decimals: int = 1) -> str:
    """A share in [0, 1] as `12.3 %`."""
    return MISSING if share is None else f"{fixed(100 * share, decimals)} %"


def raised(share: float | None) -> str:
    """A change as `8.1 % higher` or `4.0 % lower`."""
    if share is None:
        return MISSING
    return f"{percent(abs(share))} {'lower' if share < 0 else 'higher'}"


def seconds(value: float | None) -> str:
    """A duration: `0.4 s`, `42 s`, `6 min 05 s`, `2 h 10 min`."""
    if value is None:
        return MISSING
    if value < 9.95:
        return f"{value:.1f} s"
    if value < 59.5:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def decimals_for(half_width: float | None, fallback: int) -> int:
    """Decimals that show two digits of an interval's half-width, between 0 and 6."""
    if not half_width or half_width <= 0:
        return fallback
    return min(6, max(0, 1 - math.floor(math.log10(half_width))))


def short_hash(value: object) -> str:
    """The first 12 characters of a hash."""
    return str(value)[:12] if value else "not recorded"


def plural(number: int, word: str) -> str:
    """`1 item`, `2 items`."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def typographic(text: str) -> str:
    """For the HTML page: the minus sign before figures, and no line break before a percent sign."""
    return re.sub(r"(?<=\d) %", "\u00a0%", re.sub(r"(?<![\w.])-(?=\d)", "−", text))
