"""How much memory there is, asked before much of it is taken: a kernel that runs out of it kills without a word."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sitdist.errors import OutOfMemoryError

SMALL = 2**27  # bytes that are taken without asking
ROOT = Path("/")


def require_memory(need: int, what: str, remedy: str) -> None:
    """OutOfMemoryError if `need` bytes for `what` are more than this process can have; the remedy ends the line.

    Processes of a launcher on one machine share its memory evenly. Nothing is known, and all is allowed, where there
    is no /proc.
    """
    if need < SMALL:
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or "1")
    limits = [(free, total // max(1, local)) for free, total in _limits()]
    there = min((min(limit) for limit in limits), default=need)
    if need > there:
        raise OutOfMemoryError(
            f"{what}: about {need / 1e9:,.1f} GB of memory, and {there / 1e9:,.1f} are free; {remedy}"
        )


def _limits() -> Iterator[tuple[int, int]]:
    """What is free and what there is, in bytes, of the machine and of every control group of this process."""
    with suppress(OSError, ValueError, LookupError):
        lines = (ROOT / "proc/meminfo").read_text().splitlines()
        size = {name: 1024 * int(words.split()[0]) for name, _, words in (line.partition(":") for line in lines)}
        yield size["MemAvailable"] + size["SwapFree"], size["MemTotal"] + size["SwapTotal"]
    groups: list[str] = []
    with suppress(OSError):
        groups = (ROOT / "proc/self/cgroup").read_text().splitlines()
    for group in groups:
        _, kinds, path = group.split(":", 2)
        if kinds in ("", "memory"):
            home = ROOT / "sys/fs/cgroup" / kinds
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
            inner = home / path.strip("/")
            for folder in (inner, *inner.parents):
                if folder.is_relative_to(home):
                    with suppress(OSError, ValueError):  # "max" is no number, and no limit
                        limit, used = (int((folder / name).read_text()) for name in names)
                        pairs = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
                        cached = sum(int(value) for name, value in pairs if name in ("active_file", "inactive_file"))
                        yield limit - used + cached, limit
