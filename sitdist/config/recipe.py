"""Schemas of dataset recipes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    Tag,
    model_validator,
)

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
    """Training views once more, `copies` times each, as from a distance that is uniform in `range`.

    The picture is zoomed about its centre by r / r', the outside filled with `background` (by default the source's
    own; .npz files have none), and the camera moved along its line of sight from r to r'. That is exact for an object
    that is small against both.
    """

    range: RadiusRange
    copies: Positive = 1
    background: Colour | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _ordered(self) -> RadiusAugmentation:
        if self.range[0] > self.range[1]:
            raise ValueError(f"range {list(self.range)} runs backwards; write [smaller, larger]")
        return self


class SceneSource(Schema):
    """Views of the built-in object, or of a scene fitted to photos, rendered when the shards are built.

    Cameras stand on a shell about the origin and look at it, upright; the options say otherwise. `radius_bins`: edges
    of bins with equally many views each, in the place of `radius`; `elevation_deg`: in the place of `sphere`;
    `fov_range_deg`: the field of view varies, in the place of `fov_deg`; `target_jitter`: they look at points of a ball
    of this radius about the origin; `roll_deg`: they are rolled by up to this angle to either side; `background`: in
    the place of the scene's own. `scene`: folder of a fitted scene, in the place of the built-in object.
    """

    kind: Literal["scene"]
    views: Positive
    radius: RadiusRange = (3.0, 5.0)
    radius_bins: Annotated[list[PositiveNumber], Field(min_length=2)] | None = None
    sphere: Literal["upper", "full"] = "upper"
    elevation_deg: ElevationRange | None = None
    azimuth_deg: AzimuthRange = (0.0, 360.0)
    fov_deg: Fov = 40.0
    fov_range_deg: FovRange | None = None
    target_jitter: NonNegativeNumber = 0.0
    roll_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    background: Colour | None = None
    scene: Word | None = None
    supersample: Annotated[int, Field(ge=1, le=8)] = 2
    seed: Seed = 0
    label: Label = 0
    name: Title | None = None
    radius_augmentation: RadiusAugmentation | None = None

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
    def _ordered(self) -> SceneSource:
        for name in ("radius", "elevation_deg", "azimuth_deg", "fov_range_deg"):
            range_ = getattr(self, name)
            if range_ is not None and range_[0] > range_[1]:
                raise ValueError(f"{name} {list(range_)} runs backwards; write [smaller, larger]")
        bins = self.radius_bins
        if bins is not None and any(low >= high for low, high in pairwise(bins)):
            raise ValueError(f"radius_bins {bins} do not rise; write the edges of the bins, such as [1, 2, 3]")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> SceneSource:
        bins, elevation, fov = self.radius_bins, self.elevation_deg, self.fov_range_deg
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
    """Posed pictures in .npz files (images, poses, focal): one file, several, or a folder of them."""

    kind: Literal["npz"]
    paths: Annotated[list[Word], Field(min_length=1)]
    label: Label = 0
    name: Title | None = None
    radius_augmentation: RadiusAugmentation | None = None

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

    kind: Literal["transforms"]
    path: Word
    background: Colour = (1.0, 1.0, 1.0)
    label: Label = 0
    name: Title | None = None
    radius_augmentation: RadiusAugmentation | None = None


Source = Annotated[SceneSource | NpzSource | TransformsSource, Field(discriminator="kind")]
Sources = Annotated[
    Annotated[Source, Tag("one")] | Annotated[list[Source], Field(min_length=1), Tag("several")],
    Discriminator(lambda value: "several" if isinstance(value, list) else "one"),
]


class PcaCodecConfig(Schema):
    """Closed-form linear patch codec, fitted on the first training views."""

    kind: Literal["pca"]
    channels: Annotated[int, Field(gt=0, le=4096, multiple_of=4)] = 4
    patch: Annotated[int, Field(gt=0, le=64)] = 4
    fit_views: Positive = 1000


class VaeCodecConfig(Schema):
    """diffusers AutoencoderKL from a local folder or a hub id."""

    kind: Literal["vae"]
    path: Word
    dtype: Literal["fp32", "bf16"] = "fp32"


class DatasetCodecConfig(Schema):
    """The codec of a finished dataset, so that a run trained on one can be tested on the other."""

    kind: Literal["dataset"]
    path: Word


Codec = Annotated[PcaCodecConfig | VaeCodecConfig | DatasetCodecConfig, Field(discriminator="kind")]


class Recipe(Schema):
    """How a dataset is made: each split's views (of one source or of a list), the codec, and the shards' size.

    `packing`: what the last row of a packed pose carries, nothing (pose) or the normalized intrinsics.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=100)]
    image_size: Pixels
    codec: Codec
    packing: Literal["pose", "intrinsics"] = "pose"
    splits: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=100)], Sources]
    val_views: NonNegative = 64
    samples_per_shard: Annotated[int, Field(gt=0, le=10**7)] = 1000
    encode_batch: Positive = 64
    seed: Seed = 0

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
    def _only_training_views_are_augmented(self) -> Recipe:
        for split in self.splits:
            if split != "train" and any(source.radius_augmentation is not None for source in self.sources(split)):
                raise ValueError(f"split '{split}' has radius_augmentation, which is for training views; remove it")
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
