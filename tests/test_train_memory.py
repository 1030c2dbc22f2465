"""Freed memory is kept inside the block, and given back after it."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from edgedisp.train.memory import freed_memory_kept


def faults_of(work: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(work):
        torch.ones(4 << 20)  # 16 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_is_asked_for_once() -> None:
    outside = faults_of(20)
    with freed_memory_kept():
        faults_of(2)
        inside = faults_of(20)
    assert outside > 20 * 1000  # 4,096 pages of 4 kB each time, fewer where pages are huge
    assert inside < outside / 20


def test_a_block_ends_as_it_began_also_after_an_error() -> None:
    with pytest.raises(RuntimeError), freed_memory_kept():
        raise RuntimeError
    faults_of(1)
