"""The wheel carries the device side, with the phone page's libraries where `make web` has fetched them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from browsers import TOP, WEB, needs_web

from edgedisp.bench.page_server import page_resources

pytest.importorskip("hatchling", reason='builds a wheel: pip install "edgedisp[dev]"')
FOLDER = "edgedisp/packaged/export/web"  # of the page, in the wheel


def build_wheel(tree: Path, out: Path) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


@needs_web
def test_what_is_installed_serves_the_page_of_the_checkout(tmp_path: Path) -> None:
    with build_wheel(TOP, tmp_path) as wheel:
        for line in (WEB / "vendor.sha256").read_text().splitlines():
            sha256, name = line.split()
            assert hashlib.sha256(wheel.read(f"{FOLDER}/vendor/{name}")).hexdigest() == sha256
        wheel.extractall(tmp_path / "site")
    script = (
        "import json, edgedisp\n"
        "from edgedisp.bench.page_server import page_resources\n"
        "resources = page_resources()\n"
        "print(json.dumps([edgedisp.__file__, {name: page.tag for name, page in resources.items()}]))"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path / "site", capture_output=True, text=True, check=True)
    file, served = json.loads(result.stdout)
    assert Path(file).is_relative_to(tmp_path)
    assert served == {name: page.tag for name, page in page_resources().items()}


def test_without_the_libraries_a_wheel_is_built_and_lacks_the_page_alone(tmp_path: Path) -> None:
    tree, ignored = tmp_path / "tree", shutil.ignore_patterns("vendor", "__pycache__")
    for name in ("edgedisp", "export", "recipes"):
        shutil.copytree(TOP / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, tree / name)
    with build_wheel(tree, tmp_path / "dist") as wheel:
        names = wheel.namelist()
    assert f"{FOLDER}/index.html" in names and "edgedisp/packaged/recipes/wikipedia.yaml" in names
    assert not [name for name in names if name.startswith(f"{FOLDER}/vendor/")]
