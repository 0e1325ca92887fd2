"""The table of measures: all that is measured of one view. A new measure is one more field of `ViewRecord`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import TypeAdapter, with_config

from sitdist.evaluate.schema import (
    POSE_ENTRIES,
    STRICT,
    Angle,
    Count,
    Length,
    Measure,
    Number,
    Pose,
    Share,
    measures_of,
)

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
