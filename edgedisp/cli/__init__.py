"""The command line: what is typed, what is shown, and which exit code it ends with.

Results go to stdout, progress to stderr.
"""

from edgedisp.cli import builds, devices, models  # noqa: F401  (their commands exist once they are imported)
from edgedisp.cli.app import app
from edgedisp.cli.ending import main

__all__ = ["app", "main"]
