"""What is timed and how: one file per kind of device, and what is known about this machine.

`local.py` times bundles here, `machine.py` describes the machine (and is what `edgedisp doctor` shows),
`arithmetic.py` says what it is fast in, `graph_facts.py` reads from a graph what a timing should be held
against.
The timing itself is done by `export/runner/edgedisp_runner.py`, in a process of its own.
"""
