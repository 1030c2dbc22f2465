"""The licence of a base model, found in its folder and copied to whatever is made of it.

In a Hugging Face folder it is the `license` field in the front matter of README.md, and files named LICENSE,
NOTICE or USE_POLICY; in a .gguf file it is `general.license`. Nothing is guessed or looked up. `license.json`
records it, so that a trained model's folder still has it when it is exported.

Left out: the licence of the training text, and whether two licences go together. That is for people.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

FILE = "license.json"
PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
LARGEST_BYTES = 1_000_000  # a licence is a text
FIELDS = {"license": "license", "license_name": "license.name", "license_link": "license.link"}  # as in GGUF

Facts = dict[str, Any]
"""{base, license, license_name, license_link, found_in, files}; None and [] for what there is not."""


def read_licence(path: Path, base: str | None = None) -> Facts:
    """The licence of a model folder or a .gguf file. `base`: how the user named the model."""
    if path.is_file():
        from gguf import GGUFReader

        gguf = GGUFReader(path).fields
        fields = {key: gguf[f"general.{name}"] for key, name in FIELDS.items() if f"general.{name}" in gguf}
        texts = {key: field.contents() for key, field in fields.items()}
        return _facts(base, texts, "general.license", [])
    try:
        facts = json.loads((path / FILE).read_text(encoding="utf-8"))
        if isinstance(facts["files"], list):
            return dict(facts)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not written here, or damaged
    front = _front_matter(path / "README.md")
    if base is None and isinstance(front.get("base_model"), str):
        base = front["base_model"]
    files = {file for pattern in PATTERNS for file in path.glob(pattern) if file.is_file()}
    texts_only = [f.name for f in files if f.name != FILE and f.stat().st_size <= LARGEST_BYTES]
    return _facts(base, front, "README.md", sorted(texts_only))


def copy_licence(source: Path, output_dir: Path, base: str | None = None) -> Facts:
    """Copy a model's licence files into `output_dir`, with `license.json`; returns what that says."""
    facts = read_licence(source, base)
    for name in facts["files"]:
        if (source / name).is_file():
            shutil.copyfile(source / name, output_dir / name)
    (output_dir / FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return facts


def _facts(base: str | None, fields: dict[str, Any], place: str, files: list[str]) -> Facts:
    """A field that is a list (the hub allows one) is joined."""
    facts: Facts = {"base": base}
    for key in FIELDS:
        value = fields.get(key)
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        facts[key] = str(text) if text else None
    return {**facts, "found_in": place if facts["license"] else None, "files": files}


def _front_matter(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not text.startswith("---\n"):
        return {}
    try:
        front: Any = YAML(typ="safe", pure=True).load(text[4:].split("\n---", 1)[0])
    except YAMLError:
        return {}
    return front if isinstance(front, dict) else {}
