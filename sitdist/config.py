"""Schemas of dataset recipes and experiment configs, and how a YAML file becomes one.

Every schema is strict: an unknown key, a wrong type or a value out of range is an error that names the key, the value
and what would be right.
"""

from __future__ import annotations

import difflib
import re
import stat
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from sitdist.errors import ConfigError, shortened, shown

Positive = Annotated[int, Field(gt=0, le=10**9)]  # so that no product of two counts overflows
NonNegative = Annotated[int, Field(ge=0, le=10**9)]
Steps = Annotated[int, Field(gt=0, le=10**6)]  # of a solver; in float32 their times differ
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Label = Annotated[int, Field(ge=0, lt=10**6)]
Title = Annotated[str, Field(min_length=1, max_length=1000)]
Pixels = Annotated[int, Field(gt=0, le=16384)]
PositiveNumber = Annotated[float, Field(gt=0, le=1e9)]
NonNegativeNumber = Annotated[float, Field(ge=0, le=1e9)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _name(text: str) -> str:
    """A text that can be a path or a name."""
    if "\0" in text:
        raise ValueError("holds a NUL, which no name can have; write another")
    return text


Word = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_name)]

# YAML has lists, no tuples: these take a list, whose items are as strict as all others.
RadiusRange = Annotated[tuple[PositiveNumber, PositiveNumber], Field(strict=False)]
Colour = Annotated[tuple[Share, Share, Share], Field(strict=False)]
Elevation = Annotated[float, Field(ge=-90.0, le=90.0)]
ElevationRange = Annotated[tuple[Elevation, Elevation], Field(strict=False)]
Azimuth = Annotated[float, Field(ge=-360.0, le=360.0)]
AzimuthRange = Annotated[tuple[Azimuth, Azimuth], Field(strict=False)]
Fov = Annotated[float, Field(gt=1.0, lt=170.0)]
FovRange = Annotated[tuple[Fov, Fov], Field(strict=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]


class Schema(BaseModel):
    """Base of all schemas: unknown keys and other types are refused, numbers are finite, assignments are checked."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_assignment=True)


# --------------------------------------------------------------------------------------------------------- recipes


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


# ----------------------------------------------------------------------------------------------------- experiments

SIT_SIZES: dict[str, tuple[int, int, int]] = {  # name: (depth, hidden_size, num_heads), Ma et al. 2024, table 1
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
_SIZES = ("patch_size", "hidden_size", "depth", "num_heads")
SIT_PRESETS = tuple(f"SiT-{size}/{patch}" for size in SIT_SIZES for patch in (2, 4, 8))


class ModelConfig(Schema):
    """Size of the transformer: a published preset such as SiT-B/8, or free sizes. The data give the latent's shape.

    `mlp`: the perceptrons, gelu as published, or swiglu with as many weights (better on the chair: docs/backbone.md).
    `init_from`: a file of weights to start from, a published SiT checkpoint (.pt) or a .safetensors.
    """

    preset: str | None = None
    patch_size: Pixels | None = None
    hidden_size: Annotated[int, Field(gt=0, le=65536, multiple_of=4)] | None = None
    depth: Annotated[int, Field(gt=0, le=1000)] | None = None
    num_heads: Annotated[int, Field(gt=0, le=4096)] | None = None
    mlp_ratio: Annotated[float, Field(ge=0.25, le=64)] = 4.0
    mlp: Literal["gelu", "swiglu"] = "gelu"
    num_classes: Annotated[int, Field(gt=0, le=10**6)] = 1
    class_dropout_prob: Share = 0.1
    learn_sigma: bool = False
    init_from: Word | None = None

    @field_validator("preset")
    @classmethod
    def _known(cls, preset: str | None) -> str | None:
        if preset is not None and preset not in SIT_PRESETS:
            near = difflib.get_close_matches(preset, SIT_PRESETS, 1, 0.0)[0]
            raise ValueError(f"'{preset}' is not a published size; did you mean '{near}'?")
        return preset

    @model_validator(mode="after")
    def _sized(self) -> ModelConfig:
        given = {name for name in _SIZES if getattr(self, name) is not None}
        if self.preset is None and given != set(_SIZES):
            missing = ", ".join(name for name in _SIZES if name not in given)
            raise ValueError(f"give preset, or all of {', '.join(_SIZES)}; missing: {missing}")
        if self.preset is not None and given:
            raise ValueError(f"preset {self.preset} already fixes {sorted(given)}; give one or the other")
        if self.hidden_size is not None and self.num_heads is not None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}")
        return self

    def sizes(self) -> dict[str, int]:
        """patch_size, hidden_size, depth and num_heads, whichever way they were given."""
        if self.preset is None:
            values = (self.patch_size, self.hidden_size, self.depth, self.num_heads)
            return {name: value for name, value in zip(_SIZES, values, strict=True) if value is not None}
        size, patch = self.preset.removeprefix("SiT-").split("/")
        depth, hidden_size, num_heads = SIT_SIZES[size]
        return {"patch_size": int(patch), "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads}


class FlowConfig(Schema):
    """The interpolant: its path, its t = 0 end, and how t is drawn.

    `endpoint` pose: x0 = gain * pack(pose) + sigma * noise, the entries of a row as quadrants or interleaved
    (`layout`). `endpoint` gaussian: x0 is noise (sigma 1), and the model gets the pose as a condition.
    """

    path: Literal["linear", "gvp", "vp"] = "linear"
    endpoint: Literal["pose", "gaussian"] = "pose"
    sigma: NonNegativeNumber = 0.1
    gain: PositiveNumber = 1.0
    layout: Literal["quadrants", "interleaved"] = "quadrants"
    prediction: Literal["velocity", "x0", "score"] = "velocity"
    loss_weight: Literal["none", "velocity", "likelihood"] = "none"
    share_at_one: Share = 0.25
    share_at_zero: Share = 0.15
    weight_at_one: PositiveNumber = 1.0

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        """The gaussian endpoint has sigma 1, so that a resolved config reads the same."""
        if isinstance(values, dict) and values.get("endpoint") == "gaussian":
            return {"sigma": 1.0} | values
        return values

    @model_validator(mode="after")
    def _no_packing(self) -> FlowConfig:
        if self.endpoint == "gaussian" and (self.sigma, self.gain, self.layout) != (1.0, 1.0, "quadrants"):
            raise ValueError(
                f"the gaussian endpoint is N(0, 1) and packs no pose, but sigma {self.sigma:g}, gain {self.gain:g} and "
                f"layout {self.layout} are given; leave them out, or set endpoint: pose"
            )
        return self

    @model_validator(mode="after")
    def _shares(self) -> FlowConfig:
        if self.share_at_one + self.share_at_zero > 1:
            raise ValueError(f"share_at_one + share_at_zero is {self.share_at_one + self.share_at_zero:g}, more than 1")
        if self.weight_at_one != 1 and self.share_at_one == 0:
            raise ValueError(
                f"weight_at_one is {self.weight_at_one:g}, but no times are 1; raise share_at_one, or leave it out"
            )
        if self.path == "vp" and self.share_at_zero + self.share_at_one > 0:
            raise ValueError(
                "the vp path's velocity is infinite at t = 1; set share_at_one and share_at_zero to 0, or path: linear"
            )
        return self

    @model_validator(mode="after")
    def _learns_something(self) -> FlowConfig:
        if self.why_no_pose() and self.why_no_picture():
            raise ValueError("the gaussian endpoint at t = 1 alone neither renders nor reads poses; lower share_at_one")
        return self

    def why_no_pose(self) -> str | None:
        """Why a model that was trained so reads no pose off a picture; None if it does."""
        if self.endpoint == "gaussian":
            return "the gaussian endpoint is noise and holds no pose"
        return "the model was trained at t = 0 alone" if self.share_at_zero == 1 else None

    def why_no_picture(self) -> str | None:
        """Why a model that was trained so renders no picture of a pose; None if it does."""
        return "the model was trained at t = 1 alone, as a regressor of the pose" if self.share_at_one == 1 else None

    @model_validator(mode="after")
    def _prediction(self) -> FlowConfig:
        if self.prediction == "score" and self.endpoint != "gaussian":
            raise ValueError(
                f"prediction score needs the gaussian endpoint, not '{self.endpoint}', because score = -E[x0 | x_t] / "
                "sigma(t) holds for x0 ~ N(0, I) only; set prediction to velocity or x0"
            )
        if self.prediction == "velocity" and self.loss_weight != "none":
            raise ValueError(
                f"loss_weight {self.loss_weight} weights the errors of x0 or the score, and the prediction is velocity;"
                " set it to none, or prediction to x0"
            )
        if self.share_at_one > 0 and self.loss_weight == "likelihood":
            raise ValueError("at t = 1 the likelihood weight is infinite; set share_at_one to 0")
        if self.share_at_one > 0 and self.prediction == "score":
            raise ValueError("at t = 1 the loss says nothing of the score; set share_at_one to 0")
        if self.share_at_zero > 0 and self.loss_weight != "none":
            raise ValueError(f"at t = 0 the {self.loss_weight} weight is infinite; set share_at_zero to 0")
        return self


class OptimizerConfig(Schema):
    """torch.optim.AdamW or SGD."""

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveNumber = 1e-4
    betas: Betas = (0.9, 0.999)
    weight_decay: NonNegativeNumber = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: PositiveNumber | None = 1.0


class ScheduleConfig(Schema):
    """Learning rate over the steps: linear warm-up, then constant or half a cosine down to final_ratio."""

    kind: Literal["constant", "cosine"] = "cosine"
    warmup_steps: NonNegative = 0
    final_ratio: Share = 0.0


class AveragesConfig(Schema):
    """Averages of the weights beside that of `ema_decay`: further decays, and power profiles by relative width.

    They are kept with every checkpoint that is, and every `snapshot_every` steps for good, for `sitdist ema`.
    """

    decays: list[Annotated[float, Field(ge=0, lt=1)]] = []
    sigma_rels: list[Annotated[float, Field(gt=0, lt=0.288)]] = []
    snapshot_every: Positive | None = None

    @model_validator(mode="after")
    def _some(self) -> AveragesConfig:
        if not self.decays and not self.sigma_rels:
            raise ValueError("averages names none; give decays such as [0.99], or sigma_rels such as [0.05, 0.1]")
        if len(set(self.decays)) < len(self.decays) or len(set(self.sigma_rels)) < len(self.sigma_rels):
            raise ValueError("averages names one twice; keep one of them")
        return self


class ProfileConfig(Schema):
    """Which steps to profile: `steps` of them, after the first `start`."""

    start: NonNegative = 10
    steps: Positive = 3


class NonFiniteConfig(Schema):
    """A step whose loss or gradient is not finite changes nothing. After `in_a_row` of them the run goes back to the
    weights of its last checkpoint before them, and on with the next batches; after more than `budget` in all it stops.
    """

    in_a_row: Positive = 10
    budget: NonNegative = 100


class TrainConfig(Schema):
    """One training run. The world size is no part of it: accumulation follows from it and global_batch.

    `precision` auto: bf16 where the device computes in it, else fp32. The newest `keep_checkpoints` stay, and
    those of every `keep_every`-th step (null: no others); `checkpoint_async`: they are written while training goes on,
    from a copy on the host. `compile`: every block by itself, the model in full, or that
    and replayed as a CUDA graph (graphs), for small models whose kernels are shorter than their launches.
    `activation_checkpointing`: what blocks compute again in the backward pass and do not keep, all but the results
    of matrix products (selective), or all. `layer_norms_every`: steps between norms of every layer. `tracker`: one of
    Accelerate's, such as wandb, beside TensorBoard. `loss_spike`: a loss that many times the median of the last lines
    is told (null: none is).
    """

    steps: Positive
    global_batch: Annotated[int, Field(gt=0, le=10**6)]
    max_batch_per_device: Positive | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    deterministic: bool = False
    compile: Literal["off", "blocks", "full", "graphs"] = "off"
    activation_checkpointing: Literal["off", "selective", "all"] = "off"
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    averages: AveragesConfig | None = None
    log_every: Positive = 10
    validate_every: Positive | None = None
    validation_views: Positive = 64
    picture_views: Positive = 8
    checkpoint_every: Positive | None = None
    keep_checkpoints: Positive = 3
    keep_every: Positive | None = None
    checkpoint_async: bool = True
    layer_norms_every: Positive | None = None
    loss_spike: Annotated[float, Field(gt=1)] | None = 3.0
    non_finite: NonFiniteConfig = NonFiniteConfig()
    profile: ProfileConfig | None = None
    tracker: Literal["wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"] | None = None

    @model_validator(mode="after")
    def _layers_to_be_seen(self) -> TrainConfig:
        if self.layer_norms_every is not None and self.compile != "off":
            raise ValueError(
                f"layer_norms_every looks at layers from outside, which compile: {self.compile} hides; remove one"
            )
        return self


FixedSolver = Literal["euler", "midpoint", "heun", "heun3", "rk4", "explicit_adams", "implicit_adams"]
AdaptiveSolver = Literal["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver"]
StochasticSolver = Literal["euler_maruyama", "stochastic_heun"]


class EvaluateConfig(Schema):
    """How pictures are generated and poses estimated in validation and evaluation.

    `average`: the weights, one of the run's train.averages such as decay_0.99, or a file that `sitdist ema` wrote.
    Adaptive generators (dopri5 and those after it) choose their own steps, by an error of at most `tolerance` taken
    over the whole batch. Stochastic ones (euler_maruyama, stochastic_heun) need the gaussian endpoint; `diffusion` and
    the two after it are theirs, and last_step null leaves the last step out. `guidance` is the scale of classifier-free
    guidance (null: none), which needs labels dropped in training.

    `estimator`: one_step, the posterior mean; euler, heun, midpoint backward in `estimator_steps` steps; source, 249
    explicit Euler steps; exact, which undoes the generator; renoised, the mean over `estimator_draws` copies at
    `estimator_time`; draws, over as many draws of a vae's latent; multi_zoom, the weighted mean over the picture in
    all `zooms` about its centre (`background` around it, by default the recipe's). `readout`:
    svd, weighted, or look_at where all training cameras look at the origin upright. `refine`: the folder of a scene in
    the dataset's frame, fitted from training views alone, or built-in; poses are moved to where it shows the picture.
    """

    estimator: Literal[
        "one_step", "euler", "heun", "midpoint", "source", "exact", "renoised", "draws", "multi_zoom"
    ] = "one_step"
    estimator_steps: Steps = 50
    estimator_draws: Steps = 4
    estimator_time: Annotated[float, Field(gt=0, lt=1)] = 0.97
    readout: Literal["svd", "weighted", "look_at"] = "svd"
    zooms: Annotated[list[Annotated[float, Field(ge=0.01, le=100)]], Field(min_length=1, max_length=100)] = [
        0.75,
        0.9,
        1.0,
        1.1,
        1.25,
    ]
    background: Colour | None = None
    refine: Word | None = None
    generator: Literal[FixedSolver, AdaptiveSolver, StochasticSolver] = "heun"
    generator_steps: Steps = 10
    tolerance: PositiveNumber = 1e-6
    guidance: NonNegativeNumber | None = None
    guidance_channels: Literal["all", "three"] = "all"
    diffusion: Literal["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"] = "SBDM"
    diffusion_norm: PositiveNumber = 1.0
    last_step: Literal["Mean", "Tweedie", "Euler"] | None = "Mean"
    last_step_size: Annotated[float, Field(gt=0, lt=1)] = 0.04
    batch: Positive = 64
    average: Word | None = None
    seed: Seed = 0
    lpips_backbone: Word | None = None


class ReaderConfig(Schema):
    """How the training samples are read; but for `split_by_node` none of it changes which samples a batch holds, while
    none is damaged.

    `workers` threads read ahead; `resident`: all samples are kept on the device. A damaged sample stops the run, or
    another is put in its place, for at most `max_bad_samples` of them in a process. `cache`: the folder in which files
    of a dataset behind a URL are kept (default: ~/.cache/sitdist), and `cache_gb` how many GB of them.
    `split_by_node`: every node reads only its own share of the shards, which depends on the number of nodes.
    """

    workers: Annotated[int, Field(gt=0, le=1024)] = 2
    resident: bool = False
    on_bad_sample: Literal["stop", "replace"] = "stop"
    max_bad_samples: NonNegative = 10
    cache: Word | None = None
    cache_gb: PositiveNumber = 50.0
    split_by_node: bool = False


class Config(Schema):
    """A whole experiment: which dataset, which model, which flow, how it is trained and evaluated."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=100)]
    data: Word
    seed: Seed = 0
    model: ModelConfig
    flow: FlowConfig = FlowConfig()
    train: TrainConfig
    reader: ReaderConfig = ReaderConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _generates(self) -> Config:
        evaluate = self.evaluate
        if evaluate.generator in get_args(StochasticSolver) and self.flow.endpoint != "gaussian":
            raise ValueError(
                f"evaluate.generator {evaluate.generator} follows the score, which is known for the gaussian endpoint "
                f"only, and flow.endpoint is {self.flow.endpoint}; set evaluate.generator to heun"
            )
        if evaluate.guidance is not None and self.model.class_dropout_prob == 0:
            raise ValueError(
                f"evaluate.guidance {evaluate.guidance:g} needs a model that was trained without labels too; set "
                "model.class_dropout_prob above 0 and train again, or leave guidance out"
            )
        return self


# --------------------------------------------------------------------------------------------------------- loading

S = TypeVar("S", bound=Schema)
MAX_BYTES, MAX_DEPTH, MAX_INTEGER = 2**18, 32, 10**100


class _Loader(yaml.SafeLoader):
    """Plain YAML: no tags, anchors or aliases, no key twice, no more than MAX_DEPTH deep. A date is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [pair for pair in pairs if not pair[0].endswith((":timestamp", ":merge", ":value"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="tags, anchors and aliases are not read; write the value itself", problem_mark=event.start_mark
            )
        if self._depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_integer(self, node: Any) -> int:
        value = self.construct_yaml_int(node)
        if abs(value) > MAX_INTEGER:  # Python may not be able to print it
            raise yaml.MarkedYAMLError(problem="a number of too many digits", problem_mark=node.start_mark)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key, mark = self.construct_object(key_node, deep=True), key_node.start_mark
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(problem=f"{shown(key)} is no key", problem_mark=mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {shown(key)} is given twice", problem_mark=mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
_Loader.add_implicit_resolver(  # 1e-4 is a number
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """YAML in which whatever `_Loader` would take for a number or the like is quoted."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def read_yaml(path: Path, what: str) -> dict[Any, Any]:
    """The mapping in a YAML file, such as "config"; ConfigError if there is none. Keys and values may be anything."""
    remedy = f"give the path of a YAML {what}"
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device might never end
            raise ConfigError(f"{path}: not a file; {remedy}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, ValueError):  # a path with a NUL is a ValueError
        raise ConfigError(f"{path}: no such file; {remedy}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: more than {MAX_BYTES:,} bytes, which is no {what}; {remedy}")
    try:
        values = _parse_yaml(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {shortened(' '.join(str(error).split()), 400)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, not a mapping of keys to values")
    return values


def _parse_yaml(text: str) -> Any:
    """The value of a YAML document; ValueError if there is none."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def load_yaml(schema: type[S], path: str | Path, overrides: list[str] | None = None) -> S:
    """Read `path` as `schema`, after setting each `a.b=c` of `overrides`; ConfigError if anything does not fit."""
    values = read_yaml(Path(path), schema.__name__.lower())
    for override in overrides or []:
        set_key(values, override)
    return parse(schema, values, str(path))


def set_key(values: dict[str, Any], override: str) -> None:
    """Set `a.b=c` in nested `values`; ConfigError if `override` does not read so."""
    key, equals, text = override.partition("=")
    what = f"--set {shortened(override)}"
    if not equals or not key:
        raise ConfigError(f"{what}: expected KEY=VALUE, such as --set train.steps=100")
    *parents, last = key.split(".")
    if len(parents) >= MAX_DEPTH:
        raise ConfigError(f"{what}: no key lies so deep; expected KEY=VALUE, such as --set train.steps=100")
    try:
        value = _parse_yaml(text)
    except ValueError:
        raise ConfigError(f"{what}: {shown(text)} is not a YAML value") from None
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{what}: {parent} is {shown(inner)}, which has no keys below it")
        values = inner
    values[last] = value


def parse(schema: type[S], values: dict[str, Any], where: str) -> S:
    """Values as `schema`; ConfigError with one line that names the first wrong key, its value and the remedy."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(schema, error)}") from None
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: {shown(error.object)} is not Unicode text; write another") from None


def _explain(schema: type[Schema], error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])  # it may explain the others
    location = [part for place, part in enumerate(first["loc"]) if place not in _tag_places(first["loc"])]
    key = shortened(".".join(map(str, location))) or schema.__name__
    rest = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(schema, first["loc"][:-1])
        near = difflib.get_close_matches(str(location[-1]), known, 1, 0.6)
        remedy = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key '{key}'; {remedy}{rest}"
    if first["type"] == "missing":
        return f"'{key}' is missing; it is required{rest}"
    if first["type"] == "union_tag_invalid":
        tag, tags = first["ctx"]["tag"], first["ctx"]["expected_tags"]
        return f"{key}.kind = '{shortened(str(tag))}': should be one of {tags}{rest}"
    message = shortened(first["msg"].removeprefix("Value error, "), 400)
    value = first.get("input")
    told = "" if isinstance(value, dict | Schema) else f" = {shown(value)}"
    return f"{key}{told}: {message[0].lower() + message[1:] if message[1:2].islower() else message}{rest}"


def _tag_places(location: Sequence[Any]) -> set[int]:
    """Where in pydantic's location of an error names of unions' members stand, which are no keys."""
    if location[:1] == ("codec",):
        return {1}
    if location[:1] == ("splits",):
        return {2, 4 if location[2:3] == ("several",) else 3}
    return set()


def _keys_at(schema: type[BaseModel], location: Sequence[Any]) -> set[str]:
    """The keys a schema knows at a place inside it."""
    schemas = [schema]
    for place, part in enumerate(location):
        tagged = [choice for choice in schemas if place in _tag_places(location) and part in _kinds(choice)]
        fields = [choice.model_fields[part] for choice in schemas if part in choice.model_fields]
        schemas = tagged or [inner for field in fields for inner in _schemas_in(field.annotation)] or schemas
    return {key for choice in schemas for key in choice.model_fields}


def _kinds(schema: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(schema.model_fields["kind"].annotation) if "kind" in schema.model_fields else ()


def _schemas_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [schema for argument in get_args(annotation) for schema in _schemas_in(argument)]


def dump_yaml(value: Schema) -> str:
    """The resolved config as YAML that `load_yaml` reads back to an equal config."""
    return yaml.dump(value.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)
