"""Under which licence a base model stands, and taking that along to whatever is made of it.

Nothing is guessed and nothing looked up: it is what stands beside the weights. In a Hugging Face folder that
is the `license` field in the front matter of README.md and files named LICENSE, NOTICE or USE_POLICY; in a
.gguf file it is `general.license`. The files are copied, and `license.json` says what was found and where, so
that a model folder made by training still knows it when it is exported.

Left out: the licence of the training text, and whether two licences go together. That is for people.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

FILE = "license.json"
PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
MOST_BYTES = 1_000_000  # a licence is a text

Facts = dict[str, Any]
"""{base, license, license_name, license_link, found_in, files}; None and [] for what was not found."""


def read_licence(where: Path, base: str | None = None) -> Facts:
    """What stands beside the weights of a folder or a .gguf file. `base`: how the user named them."""
    if where.is_file():
        return {"base": base, **_from_gguf(where), "files": []}
    kept = _read_kept(where)
    if kept is not None:
        return kept
    found = _from_readme(where / "README.md")
    named = found.pop("base")
    return {"base": base or named, **found, "files": [path.name for path in _files(where)]}


def copy_licence(where: Path, own: Path, base: str | None = None) -> Facts:
    """Copy the licence files of a model into the folder `own`, with `license.json`; returns what it says."""
    facts = read_licence(where, base)
    for name in facts["files"]:
        if (where / name).is_file():
            shutil.copyfile(where / name, own / name)
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    (own / FILE).write_text(text + "\n", encoding="utf-8")
    return facts


def _files(folder: Path) -> list[Path]:
    found = {path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name != FILE and path.stat().st_size <= MOST_BYTES)


def _read_kept(folder: Path) -> Facts | None:
    try:
        kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return dict(kept) if isinstance(kept["files"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not ours, or damaged: look again


def _facts(fields: dict[str, Any], found_in: str) -> Facts:
    """The three fields as text; a list (the hub allows one) is joined."""
    said = {}
    for key in ("license", "license_name", "license_link"):
        value = fields.get(key)
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        said[key] = str(text) if text else None
    return {**said, "found_in": found_in if said["license"] else None}


def _from_readme(path: Path) -> Facts:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    fields: Any = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text.startswith("---\n"):
        try:
            fields = YAML(typ="safe", pure=True).load(text[4:].split("\n---", 1)[0])
        except YAMLError:
            fields = {}  # a README for people alone
    fields = fields if isinstance(fields, dict) else {}
    base = fields.get("base_model")
    return {**_facts(fields, "README.md"), "base": base if isinstance(base, str) else None}


def _from_gguf(path: Path) -> Facts:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    words = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    said = {key: fields.get(f"general.{word}") for key, word in words.items()}
    return _facts(
        {key: field.contents() for key, field in said.items() if field is not None}, "general.license"
    )
