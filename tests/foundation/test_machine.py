"""Claims about what the machine says of itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from longspan.foundation.machine import free_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not say")
def test_free_memory_counts_what_the_system_would_give_up() -> None:
    free = free_memory()
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert free is not None
    assert 0 < free <= 1024 * int(facts["MemTotal"].split()[0])
    # Files that the system keeps in memory are no obstacle.
    assert free == pytest.approx(1024 * int(facts["MemAvailable"].split()[0]), rel=0.2)
