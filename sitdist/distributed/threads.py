"""Threads beside the computing ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def helper_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads that work beside the main one, each of which computes alone.

    More OpenMP threads than cores do not wait awake for their next piece of work, and then all that is computed on the
    CPU is slower.
    """
    return ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))
