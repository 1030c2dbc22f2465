"""Where sentences end, by rule: enough to make test items from prose, with no model and no language pack.

A sentence ends at . ! or ? (with any closing quotes or brackets) before white space and something that can
begin a sentence: a capital, a digit, an opening quote or bracket. It does not end after an initial
("J. R. R. Tolkien"), after an abbreviation from the short list below, or after one with inner full stops
("U.S. Army", "e.g. Paris"). Left out: scripts without spaces between sentences, and headings, which stay
part of the sentence before them. A missed end makes a longer sentence, which the tasks skip or
cut; a false end makes a harder item, the same one for every model.
"""

from __future__ import annotations

import re

_END = re.compile(r"([.!?]+[\"'”’)\]]*)\s+(?=[\"'“‘(\[¿¡]*[^\W_a-z])")
_LAST_WORD = re.compile(r"\S+$")
_ABBREVIATION = re.compile(
    "mr|mrs|ms|dr|prof|rev|hon|st|mt|ft|jr|sr|gen|col|capt|lt|maj|sgt|adm|gov|sen|rep|pres|"
    "vs|etc|approx|ca|cf|al|ed|eds|vol|(?-i:No|Nos)|pp|fig|inc|ltd|co|corp|bros|dept|univ|est|"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec",
    re.IGNORECASE,
)


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans (start, end) of the sentences of a text, in order, without the white space around them."""
    spans: list[tuple[int, int]] = []
    start = len(text) - len(text.lstrip())
    for match in _END.finditer(text):
        if not _abbreviated(text[start : match.start()], match.group(1)):
            spans.append((start, match.end(1)))
            start = match.end()
    end = len(text.rstrip())
    if end > start:
        spans.append((start, end))
    return spans


def _abbreviated(before: str, mark: str) -> bool:
    """Whether the full stop after `before` belongs to its last word and ends no sentence."""
    word = _LAST_WORD.search(before)
    if word is None or mark != ".":
        return False
    bare = word.group().lstrip("\"'“‘([")
    inner_stops = "." in bare and all(len(part) <= 2 for part in bare.split("."))
    initial = len(bare) == 1 and bare.isupper()
    return initial or inner_stops or _ABBREVIATION.fullmatch(bare) is not None
