"""What a build found, told to people and to programs: report.html, report.md, report.json, plots, model card.

A pure room. Everything is made from ONE summary (a plain dict that the stages gathered); no model is
opened and no run folder is read, so the same summary gives the same bytes.

    reading.py   how a summary is read when parts of it are absent
    wording.py   how figures are written: digits, units, intervals
    table.py     the before/after table, of one run or of several
    verdict.py   what may be claimed from it, by written rules
    rendering.py the table as terminal text and as Markdown
    drawings.py  the plots; plots.py turns them into SVG, PNG and inline SVG
    results.py, provenance.py   the report's sections, shared by HTML and Markdown
    page.py      `write`: all files of the report
    card.py      the README of an exported model folder
"""
