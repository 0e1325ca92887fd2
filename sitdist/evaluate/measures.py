"""The table of measures: how results are declared, written and read back checked, and all that is measured of one view.

A record is a dataclass under STRICT. A field that is a measure is annotated with a `Measure`, which says all that
summaries, tables, plots, the report and TensorBoard need to know of it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config

from sitdist.errors import DataError, one_line
from sitdist.io.atomic import write_atomically
from sitdist.io.files import open_file

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
AGAIN = "run `sitdist eval` again"
LARGEST = 1e12
BINS_AT_MOST = 10_000  # of width 1
EDGE = 1e-6  # a camera this close below a bin's edge stands on it: radii are norms of rounded numbers
TABLE_BYTES = 2**30  # of records.csv; a million views have less
POSE_ENTRIES = [f"{row}{column}" for row in range(3) for column in range(4)]
POSES = ("true", "estimated", "rendered_estimated")
RETIRED = ("symmetric_rotation_error_deg", "symmetric_translation_error")  # columns of earlier versions, left out

Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Length = Annotated[float, Field(ge=0.0, le=LARGEST)]
Angle = Annotated[float, Field(ge=0.0, le=180.0)]  # degrees
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Pose = Annotated[list[Number], Field(min_length=12, max_length=12)]  # rows of [3, 4]
Text = Annotated[str, Field(max_length=10_000), AfterValidator(one_line)]


@dataclass(frozen=True)
class Measure:
    """What is known of a number that is measured: its name, its unit and how it is written, summarized and shown.

    rotation: an angle between rotations; its summary also has shares below thresholds and an AUC.
    of: what it says something of, the pose of a picture or the picture of a pose.
    main, spread: the statistics in the report's main table and in the table of its spread.
    baselines: fields that it is held against, by their means.
    plotted: drawn against the radius. card: in the model card.
    """

    label: str
    unit: str = ""
    style: str = ".2f"
    definition: str = ""
    rotation: bool = False
    of: Literal["pose", "picture"] | None = None
    main: tuple[str, ...] = ()
    spread: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    plotted: bool = False
    card: bool = False

    @property
    def title(self) -> str:
        """The label with its unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def text(self, value: float) -> str:
        """The value with its unit."""
        return f"{value:{self.style}} {self.unit}".strip()


def measures_of(record: type) -> dict[str, Measure]:
    """The measures of a record by the names of their fields, in order."""
    hints = get_type_hints(record, include_extras=True)
    return {name: each for name, hint in hints.items() for each in get_args(hint) if isinstance(each, Measure)}


def may_be_missing(record: type, name: str) -> bool:
    """Whether a field of a record may be None."""
    kind = get_type_hints(record)[name]
    return type(None) in get_args(kind)


def make_records(record: type, columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The fields of one record for every entry of the columns, `key` among them; None where there is no column."""
    nothing = [None] * len(columns["key"])
    names = list(get_type_hints(record))
    return [dict(zip(names, row, strict=True)) for row in zip(*(columns.get(n, nothing) for n in names), strict=True)]


def fault(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"


def damaged(path: Path, reason: object) -> DataError:
    """The one line for results that cannot be used."""
    return DataError(f"{path}: damaged ({' '.join(str(reason).split())[:200]}); {AGAIN}")


def write_records(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file with a row for every record."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda temporary: temporary.write_text(table.getvalue()))


def read_records(path: Path, schema: TypeAdapter[Any]) -> list[Any]:
    """The records of a CSV file; an empty cell is what was not measured. DataError where one is not as `schema` says.

    A pose is one cell, a list as JSON, or the twelve columns NAME_00 to NAME_23.
    """
    try:
        return [_record(row, schema) for row in _read_table(path)]
    except ValidationError as error:
        raise damaged(path, fault(error)) from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from None


def _record(row: dict[str, str], schema: TypeAdapter[Any]) -> Any:
    values: dict[str, Any] = {
        name: json.loads(text) if text and name in POSES else text or None
        for name, text in row.items()
        if name not in RETIRED
    }
    for name in POSES:
        if f"{name}_00" in values:
            entries = [values.pop(f"{name}_{entry}", None) for entry in POSE_ENTRIES]
            values[name] = entries if any(entries) else None
    return schema.validate_python(values, strict=False)


def _read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by the names of its columns; DataError where there are none."""
    with open_file(path, AGAIN, TABLE_BYTES) as file:
        data = file.read()
    text = data.decode()
    if not text.endswith("\n"):
        raise damaged(path, "the last line is cut off")
    try:
        head, *lines = csv.reader(io.StringIO(text))
    except csv.Error as error:
        raise damaged(path, error) from None
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    if not rows:
        raise damaged(path, "no rows")
    return rows


MEAN_MEDIAN = ("mean", "median")
CONSTANT = "constant pose"
NEAREST = "nearest training view"
CODEC = "codec ceiling"
LEAST_RADIUS = 1e-6


@with_config(STRICT)
@dataclass(frozen=True)
class ViewRecord:
    """All that is measured of one view. None is what was not measured.

    `true` and `estimated` are the upper three rows of camera_to_world, row-major. `function_evaluations` and
    `converged` are those of the pose. Error bars and trust are those of a calibrated run.
    """

    key: str
    label: Count
    radius: Length
    bin: Count
    rotation_error_deg: Annotated[
        Angle | None,
        Measure(
            label="rotation error",
            unit="deg",
            definition="Angle between the true and the estimated camera rotation, both in SO(3): "
            "2 asin(|R1 - R2|_F / (2 sqrt 2)).",
            rotation=True,
            of="pose",
            main=(*MEAN_MEDIAN, "share_under_5_deg"),
            spread=(
                *("interval", "share_under_1_deg", "share_under_2_deg", "share_under_10_deg", "share_under_30_deg"),
                "auc_30_deg",
            ),
            baselines=("constant_rotation_error_deg", "nearest_rotation_error_deg"),
            plotted=True,
            card=True,
        ),
    ]
    translation_error: Annotated[
        Length | None,
        Measure(
            label="translation error",
            style=".3f",
            definition="Distance between the true and the estimated camera position, in the dataset's units.",
            of="pose",
            main=MEAN_MEDIAN,
            spread=("interval",),
            baselines=("constant_translation_error", "nearest_translation_error"),
            plotted=True,
            card=True,
        ),
    ]
    focal_error: Annotated[
        Length | None,
        Measure(
            label="focal error",
            unit="%",
            definition="Error of the focal length, as a share of the true one.",
            of="pose",
            main=MEAN_MEDIAN,
        ),
    ]
    psnr: Annotated[
        Number | None,
        Measure(
            label="PSNR",
            unit="dB",
            definition="Peak signal-to-noise ratio of the rendered against the true view for pixels in [0, 1]; "
            "means are over the views' own PSNRs.",
            of="picture",
            main=MEAN_MEDIAN,
            spread=("interval",),
            baselines=("codec_psnr", "nearest_psnr"),
            plotted=True,
            card=True,
        ),
    ]
    mae: Annotated[
        Length | None,
        Measure(
            label="MAE",
            style=".4f",
            definition="Mean absolute error of the rendered against the true view, for pixels in [0, 1].",
            of="picture",
            main=MEAN_MEDIAN,
            spread=("interval",),
            baselines=("codec_mae",),
        ),
    ]
    ssim: Annotated[
        Number | None,
        Measure(
            label="SSIM",
            style=".3f",
            definition="Structural similarity of the rendered and the true view: Gaussian window of 11 pixels and "
            "deviation 1.5.",
            of="picture",
            main=MEAN_MEDIAN,
            spread=("interval",),
            baselines=("codec_ssim",),
            card=True,
        ),
    ]
    lpips: Annotated[
        Number | None,
        Measure(
            label="LPIPS",
            style=".3f",
            definition="Learned perceptual distance, version 0.1, of the rendered and the true view.",
            of="picture",
            main=MEAN_MEDIAN,
        ),
    ]
    codec_psnr: Annotated[Number, Measure(CODEC, "dB")]
    codec_ssim: Annotated[Number, Measure(CODEC, style=".3f")]
    codec_mae: Annotated[Length, Measure(CODEC, style=".4f")]
    constant_rotation_error_deg: Annotated[Angle, Measure(CONSTANT, "deg", rotation=True)]
    constant_translation_error: Annotated[Length, Measure(CONSTANT, style=".3f")]
    nearest_rotation_error_deg: Annotated[Angle, Measure(NEAREST, "deg", rotation=True)]
    nearest_translation_error: Annotated[Length, Measure(NEAREST, style=".3f")]
    nearest_psnr: Annotated[Number, Measure(NEAREST, "dB")]
    true: Pose
    estimated: Pose | None
    rotation_bar_50_deg: Length | None = None
    rotation_bar_90_deg: Length | None = None
    translation_bar_50: Length | None = None
    translation_bar_90: Length | None = None
    trust: Share | None = None
    object_psnr: Annotated[
        Number | None,
        Measure(
            label="object PSNR",
            unit="dB",
            definition="PSNR over the pixels where the true view differs from the background by more than 4 of 255, "
            "for views that show the object.",
            of="picture",
            spread=("mean",),
            baselines=("codec_object_psnr",),
        ),
    ] = None
    codec_object_psnr: Annotated[Number | None, Measure(CODEC, "dB")] = None
    function_evaluations: Count | None = None
    converged: bool | None = None

    @property
    def translation_share(self) -> float | None:
        """The translation error over the camera's distance to the origin."""
        return None if self.translation_error is None else self.translation_error / max(self.radius, LEAST_RADIUS)

    def row(self) -> dict[str, Any]:
        """The record as one line of records.csv; poses become true_00 ... true_23 and estimated_00 ... estimated_23."""
        values = asdict(self)
        for name in ("true", "estimated"):
            entries = values.pop(name) or [None] * len(POSE_ENTRIES)
            values.update(zip((f"{name}_{entry}" for entry in POSE_ENTRIES), entries, strict=True))
        return values

    def text(self) -> str:
        """The errors of the view, for a caption."""
        shown = {name: measure for name, measure in MEASURES.items() if measure.main}
        values = {name: getattr(self, name) for name in shown}
        return ", ".join(
            f"{shown[name].label} {shown[name].text(value)}" for name, value in values.items() if value is not None
        )

    @property
    def rank(self) -> float:
        """What views are sorted by: the rotation error, or how low the PSNR is where no pose is read."""
        return -(self.psnr or 0.0) if self.rotation_error_deg is None else self.rotation_error_deg


RECORD = TypeAdapter(ViewRecord)
MEASURES = measures_of(ViewRecord) | {
    "translation_share": Measure(
        label="of radius",
        style=".1%",
        definition="Translation error over the distance of the true camera to the origin.",
        of="pose",
        spread=("mean",),
    )
}
