"""The numbers of an evaluation as tables of text: for the terminal, the page and the model card."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sitdist.evaluate.measures import MEASURES, Measure, damaged
from sitdist.evaluate.report.stored import Metrics, Row, load_metrics, parse_metrics
from sitdist.evaluate.statistics import AUC_DEFINITION, INTERVAL_DEFINITION, THRESHOLDS
from sitdist.flow.choices import AdaptiveSolver

LINE = 108  # characters of the terminal's table
Of = Literal["pose", "picture"]
NEAREST = {
    "pose": "Baselines, by their means: constant is the mean training pose, nearest the pose of the training view with "
    "the nearest latent.",
    "picture": "Baselines, by their means: codec is the true view encoded and decoded, the ceiling of every rendered "
    "view; nearest is the training view with the nearest camera, decoded.",
}
NOISE_FLOOR = (
    "The noise floor is what the noise of a packed pose leaves on average to an estimator that recovers x0 exactly; "
    "one_step estimates the mean of x0 and has none."
)
INTERVAL = f"95% of mean: {INTERVAL_DEFINITION}"
AUC = f"AUC@30: {AUC_DEFINITION[0].lower()}{AUC_DEFINITION[1:]}"
HEADS = {"interval": "95% of mean", "auc_30_deg": "AUC@30"}
HEADS |= {f"share_under_{angle}_deg": f"<{angle} deg" for angle in THRESHOLDS}
STYLES = {"auc_30_deg": ".3f"} | {f"share_under_{angle}_deg": ".1%" for angle in THRESHOLDS}


@dataclass(frozen=True)
class Column:
    """A statistic of a measure, under the measure's name and `head`; an interval is two numbers."""

    group: str
    head: str
    field: str
    statistic: str = "mean"

    def format(self, value: float) -> str:
        return format(value, STYLES.get(self.statistic, MEASURES[self.field].style))

    def cell(self, row: Row) -> str:
        """The number as text; n/a where it was not measured."""
        summary = row.get(self.field)
        ends = ("low", "high") if self.statistic == "interval" else (self.statistic,)
        values = [None if summary is None else getattr(summary, end) for end in ends]
        known = [self.format(value) for value in values if value is not None]
        return " to ".join(known) if len(known) == len(values) else "n/a"


def _columns(name: str, statistics: tuple[str, ...], with_baselines: bool) -> list[Column]:
    """The statistics of a measure, and the means of its baselines under the first words of their names."""
    group = MEASURES[name].title
    columns = [Column(group, HEADS.get(each, each), name, each) for each in statistics]
    baselines = MEASURES[name].baselines if with_baselines else ()
    return columns + [Column(group, MEASURES[each].label.split()[0], each) for each in baselines]


def main_columns(of: Of, measured: Callable[[str], bool]) -> list[Column]:
    """Means, medians and baselines of what is measured of poses, or of pictures.

    A measure without baselines is left out where `measured` does not say that it is there.
    """
    shown = {name: measure for name, measure in MEASURES.items() if measure.of == of and measure.main}
    return [
        column
        for name, measure in shown.items()
        if measure.baselines or measured(name)
        for column in _columns(name, measure.main, True)
    ]


def _spread_columns(of: Of, metrics: Metrics) -> list[Column]:
    """Intervals and shares of what was measured by an evaluation that states them."""

    def stated(name: str, measure: Measure) -> bool:
        summaries = [row.get(name) for row in metrics.rows]
        return measure.of == of and any(each is not None and each.low is not None for each in summaries)

    return [
        column
        for name, measure in MEASURES.items()
        if stated(name, measure)
        for column in _columns(name, measure.spread, not measure.main)
    ]


@dataclass(frozen=True)
class Table:
    """A block of the summary: its columns, a line of cells for every row (name and n first), and what it means.

    `rows_are`: what the names of the rows are.
    """

    title: str
    columns: list[Column]
    lines: list[list[str]]
    notes: list[str]
    rows_are: str = "radius"

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The names above the columns, in order, with how many columns each spans."""
        names = [column.group for column in self.columns]
        return [(name, names.count(name)) for name in dict.fromkeys(names)]


def tables_of(metrics: Metrics) -> list[Table]:
    """Poses and pictures by radius and by object, beside their baselines; none where no radii were measured."""
    if not metrics.rows:
        return []
    kinds: tuple[tuple[Of, str], ...] = (("pose", "Pose of a picture"), ("picture", "Picture of a pose"))
    tables, by_object = [], []
    for of, title in kinds:
        columns, spread = main_columns(of, metrics.measured), _spread_columns(of, metrics)
        lines = _lines(metrics.rows, columns)
        if of == "pose" and metrics.floors:
            lines.append(["noise floor", "", *(_floor(metrics, column) for column in columns)])
        tables.append(Table(title, columns, lines, _notes(of, metrics)))
        if spread:
            notes = [INTERVAL, AUC] if of == "pose" else [_object_note(metrics)]
            tables.append(Table(f"{of.capitalize()}: spread", spread, _lines(metrics.rows, spread), notes))
        if metrics.labels:
            by_object.append(Table(f"{title}, by object", columns, _lines(metrics.labels, columns), [], "object"))
    return tables + by_object


def _lines(rows: list[Row], columns: list[Column]) -> list[list[str]]:
    return [[row.name, f"{row.n}", *(column.cell(row) for column in columns)] for row in rows]


def _floor(metrics: Metrics, column: Column) -> str:
    is_mean = column.statistic == "mean" and column.field in metrics.floors
    return column.format(metrics.floors[column.field]) if is_mean else ""


def _notes(of: Of, metrics: Metrics) -> list[str]:
    """What the main table leaves out and why, and what its columns are."""
    notes = [NEAREST[of]]
    if of == "pose" and metrics.no_pose:
        notes.insert(0, f"No pose is read off a picture: {metrics.no_pose}.")
    if of == "picture":
        if metrics.no_picture:
            notes.insert(0, f"No picture is rendered: {metrics.no_picture}.")
        notes.append(f"LPIPS{' backbone:' if metrics.measured('lpips') else ''} {metrics.lpips}.")
    if metrics.radius_augmented:
        count, total = metrics.radius_augmented, metrics.training_views.count
        notes.append(
            f"Radius augmented: {count} of the {total} training views are zoomed copies, for every row and baseline."
        )
    if of == "pose" and metrics.floors:
        notes.append(NOISE_FLOOR)
    return notes


def _object_note(metrics: Metrics) -> str:
    if metrics.background is None:
        return "Object PSNR: n/a, as the corners of the views have no common colour, so no plain background."
    colour = " ".join(f"{255 * value:.0f}" for value in metrics.background)
    return f"Object PSNR: {MEASURES['object_psnr'].definition} The background is {colour} of 255."


def format_table(metrics: dict[str, Any]) -> str:
    """The contents of metrics.json as plain text: what was evaluated and how, poses by radius, pictures by radius.

    DataError if `metrics` is not what an evaluation writes.
    """
    try:
        parsed = parse_metrics(metrics)
    except ValueError as error:
        raise damaged(Path("metrics.json"), error) from None
    blocks = [f"{parsed.run}, step {parsed.step}, on {parsed.split} of {parsed.dataset}", how(parsed)]
    return "\n".join(blocks + [_plain(table) for table in tables_of(parsed)])


def generator_text(metrics: Metrics) -> str:
    how = "adaptive steps" if metrics.generator in get_args(AdaptiveSolver) else f"{metrics.generator_steps} steps"
    guidance = "" if metrics.guidance is None else f", guidance {metrics.guidance:g}"
    return f"{metrics.generator} ({how}{guidance})"


def estimator_text(metrics: Metrics) -> str:
    count = metrics.function_evaluations
    evaluations = f" ({count} function evaluation{'s' if count > 1 else ''})" if count else ""
    return f"{metrics.estimator}{evaluations}"


def how(metrics: Metrics) -> str:
    poses = f"poses by {estimator_text(metrics)}"
    poses += f", read out by {metrics.readout}" if metrics.readout != "svd" else ""
    poses += f", refined by the scene {metrics.refine}" if metrics.refine else ""
    poses += f", {metrics.not_converged} of them not converged" if metrics.not_converged else ""
    pictures = f"pictures by {generator_text(metrics)}"
    parts = [*([] if metrics.no_pose else [poses]), *([] if metrics.no_picture else [pictures])]
    augmented = ["trained radius augmented"] if metrics.radius_augmented else []
    return ", ".join([*parts, f"sigma {metrics.sigma:g}", f"seed {metrics.seed}", *augmented])


def _plain(table: Table) -> str:
    """The table with aligned columns, its groups in a line above the heads, and its notes below."""
    heads = [table.rows_are, "n", *(column.head for column in table.columns)]
    widths = [max(map(len, cells)) for cells in zip(heads, *table.lines, strict=True)]
    spans = [2, *(count for _, count in table.groups)]
    names = [table.title, *(f" {name} " for name, _ in table.groups)]
    for start, span, name in zip(itertools.accumulate(spans, initial=0), spans, names, strict=False):
        width = sum(widths[start : start + span]) + span - 1
        widths[start] += max(0, len(name) - width)
    title, *others = _spans([" " * width for width in widths], widths, spans)
    top = [names[0].ljust(len(title))]
    top += [name.center(len(part), "-") for name, part in zip(names[1:], others, strict=True)]
    lines = [top, *(_spans(cells, widths, spans) for cells in (heads, *table.lines))]
    notes = [textwrap.fill(note, LINE) for note in table.notes]
    return "\n".join(["", *(" | ".join(line).rstrip() for line in lines), *notes])


def _spans(cells: list[str], widths: list[int], spans: list[int]) -> list[str]:
    """Cells, the first to the left and the others to the right of their columns, joined within each span."""
    padded = [
        cells[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
    ]
    edges = [sum(spans[:i]) for i in range(len(spans) + 1)]
    return [" ".join(padded[a:b]) for a, b in itertools.pairwise(edges)]


def results_markdown(run: Path, step: int) -> str:
    """The results of all evaluations in RUN/eval, as Markdown tables; DataError for one that is damaged."""
    return "\n\n".join(_table(metrics, step) for metrics in _evaluations(run))


def _evaluations(run: Path) -> Iterator[Metrics]:
    """The results of the run's evaluations, as they lie on disk; DataError for one that is damaged."""
    for path in sorted((run / "eval").glob("*/metrics.json")):
        metrics = load_metrics(path)
        if metrics.rows:
            yield metrics


def _table(metrics: Metrics, step: int) -> str:
    """One evaluation as a Markdown table."""
    names = [name for name, measure in MEASURES.items() if measure.card]
    heads = [_head(MEASURES[name]) for name in names]
    rows = [["views", "n", *heads], ["---"] * (2 + len(heads))]
    for row in metrics.rows:
        cells = [" / ".join(Column("", "", name, each).cell(row) for each in _statistics(name)) for name in names]
        rows.append([_unmarked(row.name), f"{row.n}", *cells])
    of = "" if metrics.step == step else f" (of the weights after {metrics.step} steps)"
    refined = ", poses refined by a scene" if metrics.refine else ""
    title = f"Split `{_unmarked(metrics.split)}`{of}, estimator `{_unmarked(metrics.estimator)}`{refined}:"
    return "\n".join([title, "", *(f"| {' | '.join(cells)} |" for cells in rows)])


def _statistics(name: str) -> tuple[str, ...]:
    return ("mean", "median") if MEASURES[name].rotation else ("mean",)


def _head(measure: Measure) -> str:
    unit = f" ({measure.unit})" if measure.unit else ""
    return f"{measure.label}{', mean / median' if measure.rotation else ''}{unit}"


def _unmarked(name: str) -> str:
    """A name without what Markdown and HTML read as their own."""
    return name.translate(dict.fromkeys(map(ord, "|`<>\\"), " "))
