"""Schemas of dataset recipes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from sitdist.config.schema import (
    AzimuthRange,
    Colour,
    ElevationRange,
    Fov,
    FovRange,
    Label,
    NonNegative,
    NonNegativeNumber,
    Pixels,
    Positive,
    PositiveNumber,
    RadiusRange,
    Schema,
    Seed,
    Title,
    Word,
)


class RadiusAugmentation(Schema):
    """Training views once more, as from another distance: the picture is zoomed about its centre and the camera moved
    along its line of sight. That is exact for an object that is small against both distances.
    """

    range: RadiusRange = Field(description="Smallest and largest distance; it is drawn uniformly between them.")
    copies: Positive = Field(1, description="Number of copies of every view.")
    background: Colour | None = Field(
        None, description="Colour around a picture that is zoomed out; null takes the source's. npz sources need it."
    )
    seed: Seed = Field(0, description="Seed of the distances.")

    @model_validator(mode="after")
    def _ordered(self) -> RadiusAugmentation:
        if self.range[0] > self.range[1]:
            raise ValueError(f"range {list(self.range)} runs backwards; write [smaller, larger]")
        return self


class SceneSource(Schema):
    """Views of the built-in object, or of a scene fitted to photos, rendered when the shards are built.

    Cameras stand on a shell about the origin, look at it, and are upright, unless the options say otherwise.
    """

    kind: Literal["scene"] = Field(description="Rendered views.")
    views: Positive = Field(description="Number of views.")
    radius: RadiusRange = Field((3.0, 5.0), description="Smallest and largest distance to the origin.")
    radius_bins: Annotated[list[PositiveNumber], Field(min_length=2)] | None = Field(
        None, description="Edges of bins of the distance with equally many views each; replaces radius."
    )
    sphere: Literal["upper", "full"] = Field("upper", description="Cameras above the horizon only, or everywhere.")
    elevation_deg: ElevationRange | None = Field(None, description="Range of elevations in degrees; replaces sphere.")
    azimuth_deg: AzimuthRange = Field((0.0, 360.0), description="Smallest and largest azimuth in degrees.")
    fov_deg: Fov = Field(40.0, description="Field of view in degrees.")
    fov_range_deg: FovRange | None = Field(None, description="Range of fields of view in degrees; replaces fov_deg.")
    target_jitter: NonNegativeNumber = Field(
        0.0, description="Radius of a ball about the origin; cameras look at random points in it."
    )
    roll_deg: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="Largest roll in degrees, to either side.")
    background: Colour | None = Field(None, description="Overrides the scene's background.")
    scene: Word | None = Field(None, description="Folder of a fitted scene; null is the built-in object.")
    supersample: Annotated[int, Field(ge=1, le=8)] = Field(2, description="Each pixel averages N x N rays.")
    seed: Seed = Field(0, description="Seed of the cameras.")
    label: Label = Field(0, description="Label of the object.")
    name: Title | None = Field(None, description="Name of the object.")
    radius_augmentation: RadiusAugmentation | None = Field(None, description="Training views from other distances.")

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        """What an option says of one that is not given, so that a resolved recipe reads the same."""
        if not isinstance(values, dict):
            return values
        bins, elevation, fov = (_numbers(values.get(key)) for key in ("radius_bins", "elevation_deg", "fov_range_deg"))
        filled: dict[str, Any] = {"radius": [bins[0], bins[-1]]} if bins else {}
        filled |= {"sphere": "full"} if elevation and elevation[0] < 0 else {}
        filled |= {"fov_deg": 0.5 * (fov[0] + fov[-1])} if fov else {}
        return filled | values

    @model_validator(mode="after")
    def _consistent(self) -> SceneSource:
        for name in ("radius", "elevation_deg", "azimuth_deg", "fov_range_deg"):
            range_ = getattr(self, name)
            if range_ is not None and range_[0] > range_[1]:
                raise ValueError(f"{name} {list(range_)} runs backwards; write [smaller, larger]")
        bins, elevation, fov = self.radius_bins, self.elevation_deg, self.fov_range_deg
        if bins is not None and any(low >= high for low, high in pairwise(bins)):
            raise ValueError(f"radius_bins {bins} do not rise; write the edges of the bins, such as [1, 2, 3]")
        if bins is not None and self.radius != (bins[0], bins[-1]):
            raise ValueError(f"radius {list(self.radius)} and radius_bins {bins} disagree; give one of them")
        count = 1 if bins is None else len(bins) - 1
        if self.views % count:
            fewer = self.views - self.views % count
            nearest = f"{fewer} or {fewer + count}" if fewer else f"{count}"
            raise ValueError(f"views {self.views} cannot be divided among {count} radius_bins; set it to {nearest}")
        if elevation is not None and self.sphere == "upper" and elevation[0] < 0:
            raise ValueError(f"elevation_deg {list(elevation)} goes below the upper sphere; leave sphere out")
        if fov is not None and not fov[0] <= self.fov_deg <= fov[1]:
            raise ValueError(f"fov_deg {self.fov_deg:g} is outside fov_range_deg {list(fov)}; give one of them")
        if self.azimuth_deg[1] - self.azimuth_deg[0] > 360.0:
            raise ValueError(f"azimuth_deg {list(self.azimuth_deg)} spans more than 360 degrees; go around once")
        if self.target_jitter >= self.radius[0]:
            raise ValueError(
                f"target_jitter {self.target_jitter:g} reaches the nearest cameras (radius {self.radius[0]:g}), which "
                "could not look at their target; make it smaller"
            )
        return self


def _numbers(value: Any) -> list[float]:
    """A list of numbers as it is; of anything else, none."""
    if not isinstance(value, list | tuple):
        return []
    return list(value) if all(isinstance(each, int | float) and not isinstance(each, bool) for each in value) else []


class NpzSource(Schema):
    """Posed pictures in .npz files with the arrays images, poses and focal."""

    kind: Literal["npz"] = Field(description="Pictures in .npz files.")
    paths: Annotated[list[Word], Field(min_length=1)] = Field(description="Files, or folders of them.")
    label: Label = Field(0, description="Label of the object.")
    name: Title | None = Field(None, description="Name of the object.")
    radius_augmentation: RadiusAugmentation | None = Field(None, description="Training views from other distances.")

    @model_validator(mode="after")
    def _background_known(self) -> NpzSource:
        if self.radius_augmentation is not None and self.radius_augmentation.background is None:
            raise ValueError(
                "radius_augmentation has no background, and .npz files do not tell theirs; set "
                "radius_augmentation.background, such as [1, 1, 1]"
            )
        return self


class TransformsSource(Schema):
    """Posed pictures named by a Blender or nerfstudio transforms.json."""

    kind: Literal["transforms"] = Field(description="Pictures named by a transforms.json.")
    path: Word = Field(description="The transforms.json, or the folder that holds it.")
    background: Colour = Field((1.0, 1.0, 1.0), description="Colour behind transparent pictures.")
    label: Label = Field(0, description="Label of the object.")
    name: Title | None = Field(None, description="Name of the object.")
    radius_augmentation: RadiusAugmentation | None = Field(None, description="Training views from other distances.")


Source = Annotated[SceneSource | NpzSource | TransformsSource, Field(discriminator="kind")]
Sources = Annotated[
    Annotated[Source, Tag("one")] | Annotated[list[Source], Field(min_length=1), Tag("several")],
    Discriminator(lambda value: "several" if isinstance(value, list) else "one"),
]


class PcaCodecConfig(Schema):
    """A closed-form linear patch codec, fitted on the first training views."""

    kind: Literal["pca"] = Field(description="Linear patch codec.")
    channels: Annotated[int, Field(gt=0, le=4096, multiple_of=4)] = Field(4, description="Channels of the latent.")
    patch: Annotated[int, Field(gt=0, le=64)] = Field(4, description="Side of a patch in pixels.")
    fit_views: Positive = Field(1000, description="Number of training views to fit on.")


class VaeCodecConfig(Schema):
    """An AutoencoderKL of diffusers."""

    kind: Literal["vae"] = Field(description="AutoencoderKL of diffusers.")
    path: Word = Field(description="Local folder, or hub id.")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="Precision of the network.")


class DatasetCodecConfig(Schema):
    """The codec of a finished dataset, so that a run trained on one can be tested on the other."""

    kind: Literal["dataset"] = Field(description="Codec of another dataset.")
    path: Word = Field(description="Folder of that dataset.")


Codec = Annotated[PcaCodecConfig | VaeCodecConfig | DatasetCodecConfig, Field(discriminator="kind")]


class Recipe(Schema):
    """How a dataset is made: the views of each split, the codec, and the size of the shards."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=100)] = Field(
        description="Name of the dataset."
    )
    image_size: Pixels = Field(description="Side of the pictures in pixels.")
    codec: Codec = Field(description="How pictures become latents.")
    packing: Literal["pose", "intrinsics"] = Field(
        "pose", description="Last row of a packed pose: constant (pose), or the normalized intrinsics."
    )
    splits: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=100)], Sources] = Field(
        description="The source of each split's views, or a list of sources; one of the splits is train."
    )
    keep_views: bool = Field(False, description="Also store the views with transparency, for appearance in a config.")
    val_views: NonNegative = Field(
        64, description="Number of training views to hold out as the split val; 0 where the recipe has one."
    )
    samples_per_shard: Annotated[int, Field(gt=0, le=10**7)] = Field(1000, description="Number of samples per shard.")
    encode_batch: Positive = Field(64, description="Number of views that are encoded at once.")
    seed: Seed = Field(0, description="Seed of the choice of views to hold out.")

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        """A recipe with a val split holds no views out, so that a resolved recipe reads the same."""
        if isinstance(values, dict) and isinstance(values.get("splits"), dict) and "val" in values["splits"]:
            return {"val_views": 0} | values
        return values

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        if "train" not in self.splits:
            raise ValueError("splits has no 'train'; the pose statistics and the codec come from the training views")
        if "val" in self.splits and self.val_views:
            raise ValueError("both a 'val' split and val_views are given; keep one of them")
        seeds: dict[int, str] = {}
        for name in self.splits:
            if name != "train" and any(source.radius_augmentation is not None for source in self.sources(name)):
                raise ValueError(f"split '{name}' has radius_augmentation, which is for training views; remove it")
            for seed in {source.seed for source in self.sources(name) if isinstance(source, SceneSource)}:
                if seeds.setdefault(seed, name) != name:
                    raise ValueError(
                        f"splits '{seeds[seed]}' and '{name}' have the same seed {seed}, so the same random cameras; "
                        "give each its own seed"
                    )
        if isinstance(self.codec, PcaCodecConfig) and self.image_size % (2 * self.codec.patch):
            raise ValueError(
                f"image_size {self.image_size} is no multiple of {2 * self.codec.patch} (twice codec.patch): "
                "the latent could not be divided into quadrants"
            )
        return self

    @model_validator(mode="after")
    def _objects_apart(self) -> Recipe:
        """A label is one object, and an object has one label, one name and one scene."""
        names: dict[int, str] = {}
        scenes: dict[int, str | None] = {}
        for source in [source for split in self.splits for source in self.sources(split)]:
            label, name = source.label, source.name
            if name is not None and names.setdefault(label, name) != name:
                raise ValueError(f"label {label} is both '{names[label]}' and '{name}'; give each object its own label")
            if isinstance(source, SceneSource) and scenes.setdefault(label, source.scene) != source.scene:
                raise ValueError(f"label {label} has views of two scenes; give each object its own label")
        labels = {name: label for label, name in names.items()}
        if len(labels) < len(names):
            name = next(name for label, name in names.items() if labels[name] != label)
            raise ValueError(f"'{name}' is the name of several labels; give each object one label")
        return self

    @model_validator(mode="after")
    def _no_view_twice(self) -> Recipe:
        for split in self.splits:
            cameras = Counter((each.label, each.seed) for each in self.sources(split) if isinstance(each, SceneSource))
            for (label, seed), count in cameras.items():
                if count > 1:
                    raise ValueError(
                        f"split '{split}' has label {label} with seed {seed} twice, so the same cameras twice; give "
                        "another object its own label, or the same one another seed"
                    )
        return self

    def sources(self, split: str) -> list[SceneSource | NpzSource | TransformsSource]:
        """Those of a split, also where it is only one."""
        given = self.splits[split]
        return given if isinstance(given, list) else [given]
