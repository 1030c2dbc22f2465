"""The licence of a base model, read from its folder and copied to whatever is made of it.

Read are the `license` fields in the front matter of README.md, files named LICENSE, NOTICE or USE_POLICY, and
`general.license` of a .gguf file. Nothing is guessed. `license.json` records it in every folder made here.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgedisp.core.files import read_object, write_json

FILE = "license.json"
PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
LARGEST_BYTES = 1_000_000  # a licence is a text
GGUF_FIELDS = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}

Licence = dict[str, Any]
"""{base, license, license_name, license_link, found_in, files}; None and [] for what there is not."""


def read_licence(path: Path, base: str | None = None) -> Licence:
    """The licence of a model folder or a .gguf file. `base`: how the user named the model."""
    fields: dict[str, Any] = {}
    files: list[str] = []
    if path.is_file():
        from gguf import GGUFReader

        origin, gguf = "general.license", GGUFReader(path).fields
        fields = {key: gguf[name].contents() for key, name in GGUF_FIELDS.items() if name in gguf}
    else:
        from huggingface_hub import metadata_load

        recorded = read_object(path / FILE)
        if isinstance(recorded.get("files"), list):
            return recorded
        origin = "README.md"
        with suppress(Exception):  # absent, or its front matter is not YAML
            fields = metadata_load(path / origin) or {}
        if base is None and isinstance(fields.get("base_model"), str):
            base = fields["base_model"]
        texts = {file for pattern in PATTERNS for file in path.glob(pattern) if file.is_file()}
        names = (file.name for file in texts if file.name != FILE and file.stat().st_size <= LARGEST_BYTES)
        files = sorted(names)
    values = {key: fields.get(key) or None for key in GGUF_FIELDS}
    for key, value in values.items():
        if value is not None:  # the hub allows a list
            values[key] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return {"base": base, **values, "found_in": origin if values["license"] else None, "files": files}


def copy_licence(source: Path, output_dir: Path, base: str | None = None) -> Licence:
    """Copy a model's licence files into `output_dir`, with `license.json`; returns what that says."""
    licence = read_licence(source, base)
    for name in licence["files"]:
        if (source / name).is_file():
            shutil.copyfile(source / name, output_dir / name)
    write_json(output_dir / FILE, licence)
    return licence
