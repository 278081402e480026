"""CPU cores that a process may use."""

from __future__ import annotations

import os


def own_cores() -> int:
    """Usable cores of this machine, shared out among the ranks that a launcher has started on it; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
