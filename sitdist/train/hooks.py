"""What a run does around its steps (log, validate, save, profile): a list of hooks, called in order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """One finished step. Its tensors are on the device, and nothing has waited for them."""

    step: int  # updates so far, this one included
    is_last: bool
    keys: list[str]  # of this process's samples
    losses: Tensor  # [local batch]
    t: Tensor  # [local batch]
    gradient_norm: Tensor  # 0-d, before clipping, the same on every process
    ok: Tensor  # bool, 0-d: whether the norm is finite; if not, the step changed nothing
    lr: float
    waited: float  # seconds spent waiting for data

    def due(self, every: int | None) -> bool:
        """Whether something that happens every `every` steps, and after the last one, happens now; None: never."""
        return every is not None and (self.step % every == 0 or self.is_last)


class Hook:
    """Called around every step. Every process calls every hook, in the same order."""

    def before_step(self, step: int) -> None:
        """Before step number `step` (from 0)."""

    def after_backward(self) -> None:
        """Once the gradients are there, before they are clipped."""

    def after_step(self, done: StepResult) -> None:
        """After the update."""

    def close(self) -> None:
        """After the last step, or when the run fails."""
