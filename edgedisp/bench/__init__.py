"""What is timed and how: one file per kind of device, and what is known about this machine.

`devices.py` knows the kinds of devices, each of which is one file (`local.py`, `ssh.py` ...).
`timing.py` takes turns on any `Host`, `machine.py` describes one (and is what `edgedisp doctor` shows),
`arithmetic.py` says what this one is fast in, `graph_facts.py` reads from a graph what a timing should be
held against, `projection.py` says what chips that are not at hand may reach. The timing itself is done by
`export/runner/edgedisp_runner.py`, in a process of its own.
"""
