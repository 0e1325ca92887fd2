"""The learning rate as a function of the step: there is no scheduler, hence no state to save."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, base: float, steps: int, kind: str = "constant", warmup_steps: int = 0, final_ratio: float = 0.0
) -> float:
    """The rate of the update number `step` (from 0) of `steps`.

    Linear up to `base` over the first `warmup_steps`; then `constant`, or `cosine`: half a wave from `base` towards
    `final_ratio * base`, which it would reach at `steps`.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if kind == "constant":
        return base
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return base * (final_ratio + (1.0 - final_ratio) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))
