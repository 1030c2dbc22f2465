"""The shape of a report section: content without form, so that HTML and Markdown say the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """A table of finished texts.

    `text_columns` are left-aligned; `bars` (0 to 1, one a row) draws a bar in the row's head; `folded` hides
    the table behind its caption.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    text_columns: tuple[int, ...] = (0,)
    bars: tuple[float, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """One section, shown in this order: lead, facts (label, text), plots (names), grids, notes, code
    (caption, text)."""

    key: str
    title: str
    lead: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    plots: tuple[str, ...] = ()
    grids: tuple[Grid, ...] = ()
    notes: tuple[str, ...] = ()
    code: tuple[tuple[str, str], ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing but a lead."""
        return not (self.facts or self.plots or self.grids or self.notes or self.code)
