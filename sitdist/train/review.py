"""The logging step: write a line, and deal with the steps that were left out."""

from __future__ import annotations

import logging

from torch.amp import GradScaler

from sitdist.distributed.ranks import Ranks
from sitdist.train.guard import Guard
from sitdist.train.hooks import Hook, StepResult
from sitdist.train.monitor import Monitor
from sitdist.train.saving import Saver

log = logging.getLogger(__name__)


class Review(Hook):
    """The one place where the host waits for the device: every `every` steps, look at what they came to.

    Too many steps that were left out in a row mean that the weights are at fault: the run takes those of the checkpoint
    before, and continues with the next batch.
    """

    def __init__(
        self, every: int, guard: Guard, monitor: Monitor, saver: Saver, ranks: Ranks, scaler: GradScaler | None
    ) -> None:
        self._every, self._guard, self._monitor, self._saver = every, guard, monitor, saver
        self._ranks, self._scaler = ranks, scaler

    def after_step(self, done: StepResult) -> None:
        if not done.due(self._every):
            return
        loss_scale = None if self._scaler is None else self._scaler.get_scale()
        self._guard.read()
        self._monitor.write_line(done.step, done.lr, loss_scale, self._guard.total)
        self._guard.check_budget(done.step, loss_scale)
        if self._guard.too_many_in_a_row():
            self._roll_back(done.step)

    def _roll_back(self, step: int) -> None:
        in_a_row = self._guard.in_a_row
        target = self._saver.roll_back(before=step - in_a_row)
        if target is None:
            self._guard.give_up(
                step, f"{in_a_row} steps in a row were left out, and there is no checkpoint before them"
            )
        if self._ranks.rank == 0:
            log.warning(
                "%d steps in a row were left out: back to the weights after step %d, and on with step %d",
                *(in_a_row, target, step),
            )
        self._guard.rolled_back()
