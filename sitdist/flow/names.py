"""The words that choose a method: each is declared once, here, and nothing in this file imports torch."""

from __future__ import annotations

from typing import Literal

OneStepSolver = Literal["euler", "midpoint", "heun", "heun3", "rk4"]
MultiStepSolver = Literal["explicit_adams", "implicit_adams"]
AdaptiveSolver = Literal["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver"]
Solver = Literal[OneStepSolver, MultiStepSolver, AdaptiveSolver]  # of the ODE
StochasticSolver = Literal["euler_maruyama", "stochastic_heun"]  # of the SDE
Generator = Literal[Solver, StochasticSolver]

LatentEstimator = Literal["one_step", "euler", "heun", "midpoint", "source", "exact", "renoised", "draws"]
Estimator = Literal[LatentEstimator, "multi_zoom"]  # multi_zoom reads pictures, the others latents
Readout = Literal["svd", "weighted", "look_at"]

GuidedChannels = Literal["all", "three"]
Diffusion = Literal["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"]
LastStep = Literal["Mean", "Tweedie", "Euler"]
