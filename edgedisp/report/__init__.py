"""The results of a build, for people and for programs: report.html, report.md, report.json, cards.

Everything is made from one `Run` (core/run.py); no model is opened and no run folder is read, so the same
run gives the same bytes. comparisons.py holds the one rule that calls a difference better or worse;
formatting.py the one way an estimate is written. Only render.py, figure.py and the plots need matplotlib.
"""
