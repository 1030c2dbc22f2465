"""Time and score bundles on devices: this machine, ssh, an Android phone, a browser, a phone's browser.

`devices.py` parses `--device` and opens the module of that kind. A host with Python (`local.py`, `ssh.py`)
runs `export/runner/runner.py`, one process for each bundle (`worker.py`), in turns (`interleaved_timing.py`).
Browsers (`browser.py`, `adb.py`, `phone.py`) open the page in `export/web` (`page_server.py`,
`page_protocol.py`). `results.py` makes of repetitions the rows that every device gives; `graph_stats.py`
reads what a graph costs.
"""
