"""Names that stand for several tasks.

heldout  the three made from the recipe's own text (heldout.py)
paper    the ten of the dispersion paper (arXiv 2602.00217, table 1). Below 500M parameters about half of them
         are guessed: such a task is flagged, and kept out of means.
small    those of lm-evaluation-harness that models of 100M to 600M parameters do answer above chance: by its
         model card SmolLM2-135M has 42 % on HellaSwag, 44 % on ARC, 68 % on PIQA and 35 % on OpenBookQA,
         where guessing gives 25, 25, 50 and 25; on WinoGrande it has 51 %, and guessing 50.
"""

from __future__ import annotations

from collections.abc import Iterable

from edgedisp.evaluate.heldout import TASKS

SETS: dict[str, tuple[str, ...]] = {
    "heldout": tuple(TASKS),
    "paper": (
        "anli_r2",
        "lambada_openai",
        "openbookqa",
        "piqa",
        "truthfulqa_mc2",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "medmcqa",
        "mmlu",
    ),
    "small": ("arc_easy", "hellaswag", "lambada_openai", "openbookqa", "piqa", "sciq"),
}


def expand(names: Iterable[str]) -> list[str]:
    """The tasks that names stand for, each once, in order."""
    return [*dict.fromkeys(task for name in names for task in SETS.get(name, (name,)))]
