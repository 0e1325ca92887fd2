"""Signals that ask a process to stop."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopSignal:
    """Within `with`: SIGTERM, SIGINT and SIGUSR1 set `requested` instead of ending the process.

    A launcher forwards what the terminal has already sent, so a signal often comes twice; only the first counts.
    """

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._request) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)
