"""The command line: what is typed, what is shown, and the exit code. Results: stdout; progress: stderr."""

from edgedisp.cli import builds, models  # noqa: F401  (importing them registers their commands)
from edgedisp.cli.app import app, main

__all__ = ["app", "main"]
