"""`edgedisp compare`: several finished builds, or any two models, as one summary that the report can show.

What is compared is items, not means: only those that both were asked in the very same words are paired
(evaluate/result.py, `common`), whatever the recipes.

    pairing.py  results of several trainings, paired with the first
    runs.py     `joined`: finished builds, every training an arm beside the first one's baseline
    models.py   `scored_pair`: two Hugging Face folders or bundles from anywhere, scored here
"""

from pathlib import Path


def is_run(path: Path) -> bool:
    """Whether a path names a finished run, or its report.json."""
    return (path / "report.json").is_file() or path.suffix == ".json"
