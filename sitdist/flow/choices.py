"""Names of solvers, estimators and read-outs, declared once for the flow, the config and the command line.

Nothing here imports torch.
"""

from __future__ import annotations

from typing import Literal, get_args

OneStepSolver = Literal["euler", "midpoint", "heun", "heun3", "rk4"]
MultiStepSolver = Literal["explicit_adams", "implicit_adams"]
AdaptiveSolver = Literal["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver"]
Solver = Literal[OneStepSolver, MultiStepSolver, AdaptiveSolver]  # of the ODE
StochasticSolver = Literal["euler_maruyama", "stochastic_heun"]  # of the SDE
Generator = Literal[Solver, StochasticSolver]

LatentEstimator = Literal["one_step", "euler", "heun", "midpoint", "euler_249", "exact"]
PictureEstimator = Literal["multi_zoom"]  # needs more than one latent of a view
Estimator = Literal[LatentEstimator, PictureEstimator]
Readout = Literal["svd", "look_at"]

GuidedChannels = Literal["all", "three"]
Diffusion = Literal["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"]
LastStep = Literal["Mean", "Tweedie", "Euler"]

# torchdiffeq's name of a fixed-step solver, and evaluations of the model per step.
FIXED_STEP: dict[str, tuple[str, int]] = {
    "euler": ("euler", 1),
    "midpoint": ("midpoint", 2),
    "heun": ("heun2", 2),
    "heun3": ("heun3", 3),
    "rk4": ("rk4", 4),
}
MULTI_STEP = get_args(MultiStepSolver)  # fixed steps too, from the velocities of earlier ones
ADAPTIVE = get_args(AdaptiveSolver)
SOLVERS = get_args(Solver)
STOCHASTIC = get_args(StochasticSolver)
GENERATORS = get_args(Generator)
LATENT_ESTIMATORS = get_args(LatentEstimator)
PICTURE_ESTIMATORS = get_args(PictureEstimator)
RENAMED_ESTIMATORS = {"source": "euler_249"}  # names in older files
READOUTS = get_args(Readout)
