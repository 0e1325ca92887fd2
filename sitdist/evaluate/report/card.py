"""The measured results of a run for the model card of its export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sitdist.evaluate.measures import MEASURES
from sitdist.evaluate.report.stored import Metrics, load_metrics
from sitdist.evaluate.report.tables import Column
from sitdist.evaluate.schema import Measure


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
        rows.append([_plain(row.name), f"{row.n}", *cells])
    of = "" if metrics.step == step else f" (of the weights after {metrics.step} steps)"
    refined = ", poses refined by a scene" if metrics.refine else ""
    title = f"Split `{_plain(metrics.split)}`{of}, estimator `{_plain(metrics.estimator)}`{refined}:"
    return "\n".join([title, "", *(f"| {' | '.join(cells)} |" for cells in rows)])


def _statistics(name: str) -> tuple[str, ...]:
    return ("mean", "median") if MEASURES[name].rotation else ("mean",)


def _head(measure: Measure) -> str:
    unit = f" ({measure.unit})" if measure.unit else ""
    return f"{measure.label}{', mean / median' if measure.rotation else ''}{unit}"


def _plain(name: str) -> str:
    """A name without what Markdown and HTML read as their own."""
    return name.translate(dict.fromkeys(map(ord, "|`<>\\"), " "))
