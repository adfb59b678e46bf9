"""What several targets ask of the process after an input."""

from __future__ import annotations

import os


def open_fd_count() -> int:
    """How many descriptors this process has; the one that lists them is always among them."""
    return len(os.listdir("/proc/self/fd"))
