"""What the tasks of lm-evaluation-harness would ask of a model, item by item, without a model.

lm-eval makes its requests while it evaluates. So it evaluates a model that writes down what it is asked and
gives the same answer to everything; the scores of that are thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance

from edgedisp.core.errors import BadInput
from edgedisp.evaluate import harness
from edgedisp.evaluate.answers import Request
from edgedisp.evaluate.harness import HarnessModel
from edgedisp.evaluate.tasks import Suite

ANSWER = (-1.0, False)


class _Noting(HarnessModel):
    """Notes the requests of each item."""

    def __init__(self, model: Any, suite: Suite) -> None:
        text = suite.text
        super().__init__(model, text.encode, text.decode, text.end_of_text, lead=text.lead)
        self.asked: dict[str, list[Request]] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise BadInput(
            f"--score {requests[0].task_name}: needs generated text; on a device only likelihoods are scored"
        )

    def _score(
        self, requests: Sequence[Instance], pieces: Sequence[Sequence[tuple[Any, Any]]]
    ) -> list[tuple[float, bool]]:
        noted: dict[str, list[Request]] = {}
        for request, group in zip(requests, pieces):
            noted.setdefault(f"{request.task_name}#{request.doc_id}", []).extend(group)
        if twice := noted.keys() & self.asked.keys():
            raise BadInput(f"--score: {min(twice)} is asked in two ways, which no device can be")
        self.asked |= noted
        return [ANSWER] * len(requests)


def asked(suite: Suite, task: str, model: Any) -> dict[str, tuple[Request, ...]]:
    """Item -> its requests, for a model of which `context` and `vocab_size` are known.

    Raises BadInput for a task that needs generated text.
    """
    noting = _Noting(model, suite)
    harness.run(noting, task, suite.harness_tasks[task], limit=suite.limit, seed=suite.text.seed, bootstrap=2)
    # An empty context is filled when it is scored; the name of the item is that of what was asked.
    return {one: tuple(requests) for one, requests in noting.asked.items()}
