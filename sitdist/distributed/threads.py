"""Threads beside the main one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def helper_threads(count: int, name: str) -> ThreadPoolExecutor:
    """A pool of `count` threads beside the main one, each with a single torch thread.

    With more OpenMP threads than cores, idle ones sleep instead of spinning, and everything on the CPU gets slower.
    """
    return ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))
