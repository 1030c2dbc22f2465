"""Stands for the phone page: fetches the plan and sends what the page in export/web would.

python fake_page.py URL [STOP]       URL, or a file:// page that leads there; STOP: end after so many turns
"""

from __future__ import annotations

import http.client
import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

RUN = "0123456789abcdef"
DEVICE = {
    "user_agent": "Test/1.0", "model": None, "platform": "Linux", "cores": 8, "device_memory_gb": 8.0,
    "simd": True, "isolated": False, "threads": 1, "clock_resolution_ms": 0.1,
    "runtime": "onnxruntime-web 1.30.0",
}  # fmt: skip


def figures(plan: dict[str, Any], turns: int | None = None, **changes: Any) -> dict[str, Any]:
    """What is sent after `turns` turns of plan.json: turn t takes 100 + t ms, then 10 + t ms a token."""
    generate = plan["options"]["generate"]
    timed = [
        {
            "label": label, "repetition": repetition, "turn": turn, "ttft_ms": 100.0 + turn,
            "token_ms": [10.0 + turn] * (generate - 1), "tokens": [1] * generate, "wall_s": 1.0,
            "heap_bytes": 1 << 26, "hidden": False,
        }
        for turn, (repetition, label) in enumerate(plan["turns"][:turns])
    ]  # fmt: skip
    opened = {"load_s": [0.5, 0.7, 0.6], "kv_cache_bytes_per_position": 512}
    loaded = [{"label": row["label"], **opened} for row in plan["bundles"]]
    is_scored = not any(row["requests"] for row in plan["bundles"])
    return {
        "run": RUN, "complete": is_scored and len(timed) == len(plan["turns"]), "open_together": True,
        "device": DEVICE, "loaded": loaded, "repetitions": timed, "answers": {}, "done": len(timed),
        "total": len(plan["turns"]), "note": f"repetition {len(timed)}", "trouble": None, **changes,
    }  # fmt: skip


def post(address: str, content: Any) -> int:
    """Send an upload to the server of `address`; the status."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    body = json.dumps(content).encode()
    connection.request("POST", f"{parts.path}report", body, {"Content-Type": "application/json"})
    return connection.getresponse().status


def main(address: str, stop: int | None) -> None:
    if address.startswith("file:"):
        page = Path(urlsplit(address).path).read_text(encoding="utf-8")
        address = json.loads(re.findall(r'"[^"]+"', page)[0])
    address = address.partition("?")[0]
    plan = json.loads(urlopen(f"{address}plan.json", timeout=10).read())
    for turn in range(1, len(plan["turns"]) + 1):
        if stop is not None and turn > stop:
            return
        assert post(address, figures(plan, turn)) == 200
    answers = {}
    for bundle in (bundle for bundle in plan["bundles"] if bundle["requests"]):
        items = json.loads(urlopen(address + bundle["requests"]["url"], timeout=10).read())
        answers[bundle["label"]] = [[[-1.0, False] for _ in item] for item in items]
    assert post(address, figures(plan, answers=answers, complete=True)) == 200


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
