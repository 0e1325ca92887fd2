"""What `sitdist eval --experiment` measures. This file imports nothing, so that the command line may read it."""

EXPERIMENT_NAMES = ("radii", "turntable", "interpolation", "cycle", "solvers", "robustness")
