"""The numbers of an evaluation as tables of text, for the terminal and for the page."""

from __future__ import annotations

import itertools
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sitdist.evaluate.report.stored import Metrics, Row, parse_metrics
from sitdist.evaluate.schema import damaged
from sitdist.evaluate.statistics import AUC_DEFINITION, INTERVAL_DEFINITION, THRESHOLDS
from sitdist.evaluate.symmetry import Symmetries
from sitdist.flow.choices import AdaptiveSolver

LINE = 108  # characters of the terminal's table
NEAREST_POSE = (
    "Baselines, by their means: constant is the mean training pose, nearest the pose of the training view with the "
    "nearest latent."
)
NOISE_FLOOR = (
    "The noise floor is what the noise of a packed pose leaves on average to an estimator that recovers x0 exactly; "
    "one_step estimates the mean of x0 and has none."
)
INTERVAL = f"95% of mean: {INTERVAL_DEFINITION}"
AUC = f"AUC@30: {AUC_DEFINITION[0].lower()}{AUC_DEFINITION[1:]}"
NEAREST_PICTURE = (
    "Baselines, by their means: codec is the true view encoded and decoded, the ceiling of every rendered view; "
    "nearest is the training view with the nearest camera, decoded."
)


@dataclass(frozen=True)
class Column:
    """A statistic of a summary, under `group` and `head`; `style` is how it is written.

    `interval` and `quartiles` are two numbers each.
    """

    group: str
    head: str
    field: str
    statistic: str = "mean"
    style: str = ".2f"

    def cell(self, row: Row) -> str:
        """The number as text; n/a where it was not measured."""
        summary = getattr(row, self.field)
        ends = {"interval": ("low", "high"), "quartiles": ("q25", "q75")}.get(self.statistic, (self.statistic,))
        values = [None if summary is None else getattr(summary, end) for end in ends]
        return "n/a" if None in values else " to ".join(format(value, self.style) for value in values)


def _columns(group: str, field: str, style: str, baselines: dict[str, str], share: bool = False) -> list[Column]:
    """Mean, median, share under 5 degrees where there is one, and the baselines' means (head -> field)."""
    columns = [Column(group, "mean", field, "mean", style), Column(group, "median", field, "median", style)]
    columns += [Column(group, "<5 deg", field, "share_under_5_deg", ".1%")] if share else []
    return columns + [Column(group, head, name, "mean", style) for head, name in baselines.items()]


POSE_COLUMNS = [
    *_columns(
        "rotation error (deg)",
        "rotation_error_deg",
        ".2f",
        {"constant": "constant_rotation_error_deg", "nearest": "nearest_rotation_error_deg"},
        share=True,
    ),
    *_columns(
        "translation error",
        "translation_error",
        ".3f",
        {"constant": "constant_translation_error", "nearest": "nearest_translation_error"},
    ),
]
PICTURE_COLUMNS = [
    *_columns("PSNR (dB)", "psnr", ".2f", {"codec": "codec_psnr", "nearest": "nearest_psnr"}),
    *_columns("MAE", "mae", ".4f", {"codec": "codec_mae"}),
    *_columns("SSIM", "ssim", ".3f", {"codec": "codec_ssim"}),
]
POSE_SPREAD = [
    Column("rotation error (deg)", "95% of mean", "rotation_error_deg", "interval"),
    Column("rotation error (deg)", "quartiles", "rotation_error_deg", "quartiles"),
    *(
        Column("rotation error (deg)", f"<{angle}", "rotation_error_deg", f"share_under_{angle}_deg", ".0%")
        for angle in THRESHOLDS
    ),
    Column("rotation error (deg)", "AUC@30", "rotation_error_deg", "auc_30_deg", ".3f"),
    Column("translation error", "95% of mean", "translation_error", "interval", ".3f"),
    Column("translation error", "of radius", "translation_share", "mean", ".1%"),
]
SYMMETRIC_COLUMNS = [
    Column("rotation error (deg)", "plain", "rotation_error_deg"),
    Column("rotation error (deg)", "up to symmetry", "symmetric_rotation_error_deg"),
    Column("translation error", "plain", "translation_error", "mean", ".3f"),
    Column("translation error", "up to symmetry", "symmetric_translation_error", "mean", ".3f"),
]
PICTURE_SPREAD = [
    Column("PSNR (dB)", "95% of mean", "psnr", "interval"),
    Column("PSNR (dB)", "quartiles", "psnr", "quartiles"),
    Column("object PSNR", "mean", "object_psnr"),
    Column("object PSNR", "median", "object_psnr", "median"),
    Column("object PSNR", "codec", "codec_object_psnr"),
    Column("SSIM", "95% of mean", "ssim", "interval", ".3f"),
]
LPIPS_COLUMNS = _columns("LPIPS", "lpips", ".3f", {})
FOCAL_COLUMNS = _columns("focal error (%)", "focal_error", ".2f", {})


@dataclass(frozen=True)
class Listing:
    """A plain table that the page shows when asked: its title, heads and lines."""

    title: str
    heads: list[str]
    lines: list[list[str]]


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
    listed: Listing | None = None

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The names above the columns, in order, with how many columns each spans."""
        names = [column.group for column in self.columns]
        return [(name, names.count(name)) for name in dict.fromkeys(names)]


def tables_of(metrics: Metrics) -> list[Table]:
    """Poses and pictures, by radius, beside their baselines; none where no radii were measured."""
    if not metrics.rows:
        return []
    pose_columns = POSE_COLUMNS + (FOCAL_COLUMNS if metrics.measured("focal_error") else [])
    picture_columns = PICTURE_COLUMNS + (LPIPS_COLUMNS if metrics.measured("lpips") else [])
    pose, picture = (_lines(metrics.rows, columns) for columns in (pose_columns, picture_columns))
    lpips = f"LPIPS backbone: {metrics.lpips}." if metrics.measured("lpips") else f"LPIPS {metrics.lpips}."
    pose_notes, picture_notes = [NEAREST_POSE], [NEAREST_PICTURE, lpips]
    if metrics.radius_augmented:
        count, of = metrics.radius_augmented, metrics.training_views.count
        note = f"Radius augmented: {count} of the {of} training views are zoomed copies, for every row and baseline."
        pose_notes.append(note)
        picture_notes.append(note)
    if metrics.floors:
        floor = [
            format(metrics.floors[column.field], column.style)
            if column.head == "mean" and column.field in metrics.floors
            else ""
            for column in pose_columns
        ]
        pose.append(["noise floor", "", *floor])
        pose_notes.append(NOISE_FLOOR)
    if metrics.no_pose:
        pose_notes.insert(0, f"No pose is read off a picture: {metrics.no_pose}.")
    if metrics.no_picture:
        picture_notes.insert(0, f"No picture is rendered: {metrics.no_picture}.")
    tables = [
        Table("Pose of a picture", pose_columns, pose, pose_notes),
        *_spread_tables(metrics, "rotation_error_deg", "Pose: spread", POSE_SPREAD, [INTERVAL, AUC]),
        Table("Picture of a pose", picture_columns, picture, picture_notes),
        *_spread_tables(metrics, "psnr", "Picture: spread", PICTURE_SPREAD, [_object_note(metrics)]),
    ]
    return tables + _symmetry_tables(metrics) + _label_tables(metrics, pose_columns, picture_columns)


def _spread_tables(metrics: Metrics, field: str, title: str, columns: list[Column], notes: list[str]) -> list[Table]:
    """Intervals, quartiles and shares, where `field` was measured by an evaluation that states them."""
    if not metrics.measured(field) or any(getattr(row, field).low is None for row in metrics.rows):
        return []
    return [Table(title, columns, _lines(metrics.rows, columns), notes)]


def _object_note(metrics: Metrics) -> str:
    if metrics.background is None:
        return "PSNR on the object: n/a, as the corners of the views have no common colour, so no plain background."
    colour = " ".join(f"{255 * value:.0f}" for value in metrics.background)
    return (
        f"PSNR on the object: over the pixels where the true view differs from the background ({colour} of 255) by "
        "more than 4, for views that show the object."
    )


def _symmetry_tables(metrics: Metrics) -> list[Table]:
    """Errors up to the object's symmetries, if it has any; a note on what was looked for else."""
    symmetry = metrics.symmetry
    if symmetry is None:
        return []
    columns = SYMMETRIC_COLUMNS if symmetry.symmetries else []
    lines = _lines(metrics.rows, columns) if columns else []
    listed = _pairs(symmetry) if symmetry.pairs else None
    return [Table("Symmetry", columns, lines, _symmetry_notes(symmetry), listed=listed)]


def _pairs(symmetry: Symmetries) -> Listing:
    lines = [
        [f"{pair.a}", f"{pair.b}", f"{pair.label}", f"{pair.angle_deg:.1f}", f"{pair.distance:.4f}"]
        for pair in symmetry.pairs
    ]
    heads = ["training view", "coincides with", "label", "cameras apart (deg)", "RMS between latents"]
    return Listing(f"The {len(lines)} nearest pairs of coinciding views", heads, lines)


def _symmetry_notes(symmetry: Symmetries) -> list[str]:
    """How many views coincide with one from far away, which pairs, and which motions follow."""
    notes = [
        f"{symmetry.coinciding} of {symmetry.examined} training views examined coincide with a view from a camera that "
        "is more than 20 deg away: their latents are as near as those of neighbouring cameras."
    ]
    if symmetry.pairs:
        shown = ", ".join(f"{pair.a}-{pair.b} ({pair.angle_deg:.0f} deg)" for pair in symmetry.pairs[:6])
        notes.append(f"The nearest such pairs, by number of the training sample: {shown}.")
    notes += [
        f"Symmetry of label {motion.label}: a turn of {motion.angle_deg:.1f} deg, shown by {motion.support:.0%} of "
        "the views examined. Errors up to symmetry are against the nearest pose from which the view is the same."
        for motion in symmetry.symmetries
    ]
    if not symmetry.symmetries:
        notes.append("That is no symmetry of the object, so there is no error up to symmetry beside the plain one.")
    return notes


def _label_tables(metrics: Metrics, pose_columns: list[Column], picture_columns: list[Column]) -> list[Table]:
    """The tables once more by object, where there are several."""
    if not metrics.labels:
        return []
    pose, picture = (_lines(metrics.labels, columns) for columns in (pose_columns, picture_columns))
    return [
        Table("Pose, by object", pose_columns, pose, [], "object"),
        Table("Picture, by object", picture_columns, picture, [], "object"),
    ]


def _lines(rows: list[Row], columns: list[Column]) -> list[list[str]]:
    return [[row.name, f"{row.n}", *(column.cell(row) for column in columns)] for row in rows]


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
    notes = [textwrap.fill(note, LINE) for note in table.notes]
    if not table.lines:
        return "\n".join(["", table.title, *notes])
    widths = [max(map(len, cells)) for cells in zip(heads, *table.lines, strict=True)]
    widths[0] = max(widths[0], len(table.title) - 1 - widths[1])
    spans = [2, *(count for _, count in table.groups)]
    names = [table.title, *(name for name, _ in table.groups)]
    parts = _parts([" " * width for width in widths], widths, spans)
    top = [
        names[0].ljust(len(parts[0])),
        *(f" {name} ".center(len(part), "-") for name, part in zip(names[1:], parts[1:], strict=True)),
    ]
    lines = [top, *(_parts(cells, widths, spans) for cells in (heads, *table.lines))]
    return "\n".join(["", *(" | ".join(line).rstrip() for line in lines), *notes])


def _parts(cells: list[str], widths: list[int], spans: list[int]) -> list[str]:
    """Cells, the first to the left and the others to the right of their columns, joined within each span."""
    padded = [
        cells[0].ljust(widths[0]),
        *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
    ]
    edges = [sum(spans[:i]) for i in range(len(spans) + 1)]
    return [" ".join(padded[a:b]) for a, b in itertools.pairwise(edges)]
