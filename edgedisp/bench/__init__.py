"""Time and score bundles on devices: this machine, ssh, an Android phone, a browser, a phone's browser.

`devices.py` parses `--device` and opens the module of that kind. A host with Python (`interleaved_timing.py`,
`ssh.py`) runs `export/runner/runner.py`, one process for each bundle, in turns. Browsers
(`browser.py`, `adb.py`, `phone.py`) open the page in `export/web` (`page_server.py`, `page_protocol.py`).
`results.py` makes a `DeviceResult` of the repetitions; `bundles.py` reads what a bundle's graph costs.
"""
