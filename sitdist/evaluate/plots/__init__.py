"""The plots of an evaluation, each a figure of one panel; only the rows of views are larger."""

from sitdist.evaluate.plots.calibration import calibration_figure
from sitdist.evaluate.plots.cameras import SIDES, cameras_figure, evenly
from sitdist.evaluate.plots.experiments import PARTS, experiment_figures, several_experiments
from sitdist.evaluate.plots.radius import METRICS, Metric, metric_figure, several_figure
from sitdist.evaluate.plots.sphere import error_sphere_figure, training_sphere_figure
from sitdist.evaluate.plots.style import to_png
from sitdist.evaluate.plots.views import views_figure

__all__ = [
    "METRICS",
    "PARTS",
    "SIDES",
    "Metric",
    "calibration_figure",
    "cameras_figure",
    "error_sphere_figure",
    "evenly",
    "experiment_figures",
    "metric_figure",
    "several_experiments",
    "several_figure",
    "to_png",
    "training_sphere_figure",
    "views_figure",
]
