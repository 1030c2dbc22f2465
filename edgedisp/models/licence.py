"""The licence of a base model, read from its folder and copied to whatever is made of it.

Read are the `license` fields in the front matter of README.md, files named LICENSE, NOTICE or USE_POLICY, and
`general.license` of a .gguf file. Nothing is guessed. `license.json` records it in every folder made here.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from edgedisp.core.files import read_object, write_json

FILE = "license.json"
PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
LARGEST_BYTES = 1_000_000  # a licence is a text
FIELDS = {"license": "license", "license_name": "license.name", "license_link": "license.link"}  # as in GGUF

Licence = dict[str, Any]
"""{base, license, license_name, license_link, found_in, files}; None and [] for what there is not."""


def read_licence(path: Path, base: str | None = None) -> Licence:
    """The licence of a model folder or a .gguf file. `base`: how the user named the model."""
    if path.is_file():
        from gguf import GGUFReader

        gguf = GGUFReader(path).fields
        fields = {key: gguf[f"general.{name}"] for key, name in FIELDS.items() if f"general.{name}" in gguf}
        texts = {key: field.contents() for key, field in fields.items()}
        return _licence(base, texts, "general.license", [])
    recorded = read_object(path / FILE)
    if isinstance(recorded.get("files"), list):
        return recorded
    front = _front_matter(path / "README.md")
    if base is None and isinstance(front.get("base_model"), str):
        base = front["base_model"]
    files = {file for pattern in PATTERNS for file in path.glob(pattern) if file.is_file()}
    names = [file.name for file in files if file.name != FILE and file.stat().st_size <= LARGEST_BYTES]
    return _licence(base, front, "README.md", sorted(names))


def copy_licence(source: Path, output_dir: Path, base: str | None = None) -> Licence:
    """Copy a model's licence files into `output_dir`, with `license.json`; returns what that says."""
    licence = read_licence(source, base)
    for name in licence["files"]:
        if (source / name).is_file():
            shutil.copyfile(source / name, output_dir / name)
    write_json(output_dir / FILE, licence)
    return licence


def _licence(base: str | None, fields: dict[str, Any], origin: str, files: list[str]) -> Licence:
    """A field that is a list (the hub allows one) is joined."""
    values = {key: fields.get(key) or None for key in FIELDS}
    texts = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value and str(value)
        for key, value in values.items()
    }
    return {"base": base, **texts, "found_in": origin if texts["license"] else None, "files": files}


def _front_matter(path: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception:  # absent, or not YAML
        return {}
