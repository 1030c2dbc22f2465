"""Compiled layers compute what plain ones do; freed memory is kept."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from training import open_tiny

from edgedisp.core.errors import BadInput
from edgedisp.train.performance import compiled_layers


def test_without_a_compiler_the_message_says_what_to_install(
    tiny_folder: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    model = open_tiny(tiny_folder["gpt2"])
    with pytest.raises(BadInput, match=r"there is no C\+\+ compiler: install g"), compiled_layers(model):
        pass


FAULTS = """
import resource, torch
from edgedisp.train.performance import keep_freed_memory
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(16 << 20)  # 64 MB: more than the C library ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
outside = faults(20)
with keep_freed_memory():
    faults(10)
    print(outside, faults(20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_is_faulted_in_once() -> None:
    """In a process of its own: the C library's limits move with what was freed before."""
    done = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
    outside, inside = map(int, done.stdout.split())
    assert outside > 20 * 4000  # 16,384 pages of 4 kB each time, fewer where pages are huge
    assert inside < outside / 4
