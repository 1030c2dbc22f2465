"""The results of a build, for people and for programs: report.html, report.md, report.json, cards.

Everything is made from one `Run` (core/run.py); no model is opened and no run folder is read, so the same
run gives the same bytes. comparisons.py holds the one rule that calls a difference better or worse;
formatting.py the one way an estimate is written. Only render.py, figure.py and the plots need matplotlib.
"""

from edgedisp.report.cards import bundle_card, model_card
from edgedisp.report.devices import devices_text
from edgedisp.report.results_table import answers_text, chat_command, table, table_markdown, table_text
from edgedisp.report.sections import search_text
from edgedisp.report.verdict import Verdict, summary_text, verdict

__all__ = [
    "Verdict",
    "answers_text",
    "bundle_card",
    "chat_command",
    "devices_text",
    "model_card",
    "search_text",
    "summary_text",
    "table",
    "table_markdown",
    "table_text",
    "verdict",
]
