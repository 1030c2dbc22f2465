"""`edgedisp bench --html`: all devices of one measurement on one page, without script or outside link."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from edgedisp.report.devices import sections
from edgedisp.report.reading import finite
from edgedisp.report.wording import plural, typographic


def devices_page(timed: Mapping[str, Any]) -> str:
    """The page as text; names in it are untrusted and escaped by the template."""
    clean, _ = finite(timed)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["minus"] = typographic
    source = resources.files("edgedisp.report").joinpath("devices.html.j2").read_text(encoding="utf-8")
    found = sections(clean)
    labels = {str(row["label"]) for device in clean["devices"] for row in device.get("rows") or ()}
    count = len(clean["devices"])
    names = ", ".join(str(device["device"]) for device in clean["devices"])
    facts = [plural(count, "device"), *([plural(len(labels), "bundle")] if labels else [])]
    return environment.from_string(source).render(title=names, facts=facts, sections=found) + "\n"
