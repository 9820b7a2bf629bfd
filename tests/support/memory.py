"""Peak memory of this process, for tests that run code in a process of its own."""

from __future__ import annotations

from pathlib import Path


def peak_memory() -> int:
    """Most bytes that this process has had in memory since its program began (Linux: VmHWM).

    Not `getrusage`: its ru_maxrss begins with what the process that started this one had, and so a child of a large
    test run would see no growth at all.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
