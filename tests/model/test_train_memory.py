"""Freed memory is kept inside the block, and given back after it."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgedisp.train.memory import freed_memory_kept


def faults_of(work: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(work):
        torch.ones(16 << 20)  # 64 MB: more than the C library ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


FRESH = """
import sys
sys.path.insert(0, sys.argv[1])
from test_train_memory import faults_of, freed_memory_kept
outside = faults_of(20)
with freed_memory_kept():
    faults_of(10)
    print(outside, faults_of(20))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_is_asked_for_once() -> None:
    """In a process of its own: the C library's limits move with what was freed before."""
    command = [sys.executable, "-c", FRESH, str(Path(__file__).parent)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    outside, inside = map(int, said.split())
    assert outside > 20 * 4000  # 16,384 pages of 4 kB each time, fewer where pages are huge
    assert inside < outside / 4  # the heap grows a few times more, where blocks happen to lie badly


def test_a_block_ends_as_it_began_also_after_an_error() -> None:
    with pytest.raises(RuntimeError), freed_memory_kept():
        raise RuntimeError
    faults_of(1)
