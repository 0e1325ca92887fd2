"""Several evaluations side by side: the same measures, a row for every one of them, as text and as a page."""

from __future__ import annotations

import html
from pathlib import Path

from sitdist.errors import DataError
from sitdist.evaluate.report import FOCAL_COLUMNS, LPIPS_COLUMNS, PICTURE_COLUMNS, POSE_COLUMNS, load_metrics

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 84rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-top: 1px solid #8885; }
th:first-child { text-align: left; }
@media print { div { overflow: visible; } table { font-size: 8pt; } }
"""


def compare(folders: list[Path], out: Path) -> str:
    """Write a page with the means of all evaluations, over the radii that all of them hold; returns the text of it.

    DataError where a folder holds no evaluation, or they have no row of the table in common.
    """
    found = {str(folder): load_metrics(folder / "metrics.json") for folder in folders}
    names = [row.name for row in next(iter(found.values())).rows]
    common = [name for name in names if all(any(row.name == name for row in each.rows) for each in found.values())]
    if not common:
        raise DataError(f"{', '.join(found)}: no radii in common; evaluate the runs on the same split")
    columns = [*POSE_COLUMNS, *PICTURE_COLUMNS, *LPIPS_COLUMNS, *FOCAL_COLUMNS]
    text, tables = [], []
    for name in common:
        rows = {folder: next(row for row in each.rows if row.name == name) for folder, each in found.items()}
        shown = [column for column in columns if any(getattr(row, column.field) is not None for row in rows.values())]
        heads = ["evaluation", "step", "n", *(f"{column.group} {column.head}" for column in shown)]
        lines = [
            [folder, str(found[folder].step), str(row.n), *(column.cell(row) for column in shown)]
            for folder, row in rows.items()
        ]
        text.append(_plain(name, heads, lines))
        tables.append(_table(name, heads, lines))
    title = "Evaluations side by side"
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    page += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
    out.write_text(f"{page}<body><h1>{title}</h1>{''.join(tables)}</body></html>\n")
    return "\n".join(text)


def _plain(name: str, heads: list[str], lines: list[list[str]]) -> str:
    """A line for every measure, as there are more of them than evaluations."""
    columns = list(zip(heads, *lines, strict=True))
    widths = [max(len(column[i]) for column in columns) for i in range(len(lines) + 1)]
    rows = ["  ".join(cell.rjust(width) for cell, width in zip(column, widths, strict=True)) for column in columns]
    return "\n".join([name, *rows, ""])


def _table(name: str, heads: list[str], lines: list[list[str]]) -> str:
    columns = zip(heads, *lines, strict=True)
    rows = "".join(
        f"<tr><th>{html.escape(head)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for head, *cells in columns
    )
    return f"<h2>{html.escape(name)}</h2><div><table>{rows}</table></div>"
