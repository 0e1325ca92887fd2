"""The plots of an evaluation, each a figure of one panel; only that of the cameras has two."""

from sitdist.evaluate.plots.calibration import calibration_figure
from sitdist.evaluate.plots.cameras import cameras_figure
from sitdist.evaluate.plots.radius import radius_figure, several_figure
from sitdist.evaluate.plots.sphere import sphere_figure
from sitdist.evaluate.plots.style import to_png

__all__ = ["calibration_figure", "cameras_figure", "radius_figure", "several_figure", "sphere_figure", "to_png"]
