"""What a build found, told to people and to programs: report.html, report.md, report.json, plots, model card.

A pure room. Everything is made from ONE summary (a plain dict that the stages gathered); no model is
opened and no run folder is read, so the same summary gives the same bytes.

    reading.py      how a summary is read when parts of it are absent
    wording.py      how figures are written: digits, units, intervals
    table.py        the before/after table, of one run or several; rendering.py: as text and as Markdown
    comparisons.py  paired comparisons and Holm's correction; verdict.py what may be claimed, by written rules
    picture.py      a drawing as SVG, PNG, inline SVG; plots.py, plot_inside.py, plot_scores.py: drawings
    section.py      the shape of a section; results.py, shipped.py, provenance.py the sections
    page.py         `write`: all files of the report, HTML through report.html.j2
    card.py         the README of an exported model folder

table, rendering and verdict need the standard library alone, so that a command line can show them at once.
"""
