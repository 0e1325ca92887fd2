"""Steps that are not finite: skipped on the device, reported and counted at the logging step, fatal if too many."""

from __future__ import annotations

import logging
from typing import NoReturn

import torch
from torch import Tensor

from sitdist.config.experiment import NonFiniteConfig
from sitdist.distributed.ranks import Ranks
from sitdist.errors import NonFiniteError
from sitdist.train.hooks import Hook, StepResult

log = logging.getLogger(__name__)
SMALLEST_LOSS_SCALE = 2.0**-10  # an fp16 scale below it means that every gradient overflows
KEYS_TOLD = 8


@torch.no_grad()
def nan_if_not_finite(losses: Tensor) -> Tensor:
    """Factors [B] for losses [B]: 1, but NaN where a loss is not finite.

    A NaN makes the whole gradient NaN, so every process sees it in the norm of the summed gradient.
    """
    return torch.where(losses.isfinite(), 1.0, torch.nan)


class Guard(Hook):
    """Counts the steps that were left out, and says when there are too many; every process calls every method.

    In fp16 gradients overflow while the loss scale adapts, so there only the losses count.
    """

    def __init__(self, ranks: Ranks, limits: NonFiniteConfig, fp16: bool) -> None:
        self._ranks, self._limits, self._fp16 = ranks, limits, fp16
        self._seen: list[StepResult] = []
        self.total = self.in_a_row = self.rollbacks = 0

    def state(self) -> dict[str, int]:
        """The counts, for a checkpoint; call `read` before."""
        return {"total": self.total, "in_a_row": self.in_a_row, "rollbacks": self.rollbacks}

    def load(self, state: dict[str, int]) -> None:
        """The inverse of `state`."""
        self.total, self.in_a_row, self.rollbacks = (state[name] for name in ("total", "in_a_row", "rollbacks"))

    def after_step(self, done: StepResult) -> None:
        """Keep the step's result for `read`; waits for nothing."""
        self._seen.append(done)

    def read(self) -> None:
        """Count the steps since the last call, and name the samples that were not finite; waits for the device."""
        seen, self._seen = self._seen, []
        if not seen:
            return
        finite = torch.stack([each.losses.isfinite().all() for each in seen]) if self._fp16 else None
        masked = [not ok for ok in (torch.stack([each.ok for each in seen]) if finite is None else finite).tolist()]
        if finite is not None:
            masked = list(self._ranks.any(*masked))
        for each, bad in zip(seen, masked, strict=True):
            self.in_a_row = self.in_a_row + 1 if bad else 0
            self.total += bad
            if bad:
                self._warn(each)

    def _warn(self, seen: StepResult) -> None:
        own = [key for key, fine in zip(seen.keys, seen.losses.isfinite().tolist(), strict=True) if not fine]
        keys = [key for of_process in self._ranks.gather(own) for key in of_process]
        if self._ranks.rank == 0:
            log.warning("step %d left out: the %s", seen.step - 1, _where(keys))

    def too_many_in_a_row(self) -> bool:
        """Whether the weights themselves must be at fault."""
        return self.in_a_row >= self._limits.in_a_row

    def rolled_back(self) -> None:
        """Start counting again, with the weights of an earlier checkpoint."""
        self.in_a_row = 0
        self.rollbacks += 1

    def check_budget(self, step: int, loss_scale: float | None) -> None:
        """NonFiniteError, on every process, once more steps were left out than the run is allowed."""
        if self.total > self._limits.budget:
            self.give_up(
                step, f"{self.total} steps were left out, and train.non_finite.budget is {self._limits.budget}"
            )
        if loss_scale is not None and loss_scale < SMALLEST_LOSS_SCALE:
            self.give_up(step, f"fp16 gradients overflow at any loss scale ({loss_scale:g})")

    def give_up(self, step: int, reason: str) -> NoReturn:
        """Raise NonFiniteError on every process."""
        with self._ranks.raise_together():
            raise NonFiniteError(
                f"step {step}: {reason}; look at the samples named above, or lower train.optimizer.lr, and start "
                "another run with another --out"
            )


def _where(keys: list[str]) -> str:
    if not keys:
        return "gradient is not finite, of no single sample"
    return f"loss is not finite for samples {', '.join(keys[:KEYS_TOLD])}{' ...' if len(keys) > KEYS_TOLD else ''}"
