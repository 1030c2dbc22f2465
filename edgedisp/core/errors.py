"""The failures that end a command with one line instead of a traceback."""

from __future__ import annotations


class BadInput(ValueError):
    """The user's input cannot work: says what, where, and what would work. Exit code 2, nothing written."""


class NotAtHand(BadInput):
    """A model or a data set is on a hub or in a wheel, and not on this machine."""


class BuildFailed(RuntimeError):
    """Valid input, but the work did not succeed: says which step and why. Exit code 1."""


class NotFinite(BuildFailed):
    """A loss or gradient is NaN or infinite: says where, and what can be resumed."""
