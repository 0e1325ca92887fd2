"""Names of solvers, estimators and read-outs, for the flow, the config and the command line. Imports nothing."""

# Fixed-step solvers: torchdiffeq's name, and evaluations of the model per step.
FIXED_STEP = {
    "euler": ("euler", 1),
    "midpoint": ("midpoint", 2),
    "heun": ("heun2", 2),
    "heun3": ("heun3", 3),
    "rk4": ("rk4", 4),
}
MULTI_STEP = ("explicit_adams", "implicit_adams")  # fixed steps too, from the velocities of earlier ones
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
SOLVERS = (*FIXED_STEP, *MULTI_STEP, *ADAPTIVE)
STOCHASTIC = {"euler_maruyama": "euler_maruyama", "stochastic_heun": "heun"}  # generators, and their SDE methods
GENERATORS = (*SOLVERS, *STOCHASTIC)

LATENT_ESTIMATORS = ("one_step", "euler", "heun", "midpoint", "euler_249", "exact")
PICTURE_ESTIMATORS = ("multi_zoom",)  # they need more than one latent of a view
ESTIMATORS = (*LATENT_ESTIMATORS, *PICTURE_ESTIMATORS)
RENAMED_ESTIMATORS = {"source": "euler_249"}  # names in older files
READOUTS = ("svd", "look_at")
