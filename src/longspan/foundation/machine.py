"""What this process may use of the machine, without importing anything heavy."""

from __future__ import annotations

import os

ALLOCATOR = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1"
"""glibc tunables that keep freed memory in the process: 1.1 to 1.3 times the training speed on CPU."""


def available_cores() -> int:
    """Cores this process may use (affinity respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
