"""Schemas of experiment configs."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from sitdist.config.schema import (
    Betas,
    Colour,
    NonNegative,
    NonNegativeNumber,
    Pixels,
    Positive,
    PositiveNumber,
    Schema,
    Seed,
    Share,
    Steps,
    Word,
)
from sitdist.flow.choices import RENAMED_ESTIMATORS

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

    `estimator`: one_step, the posterior mean; euler, heun, midpoint backward in `estimator_steps` steps; euler_249,
    249 explicit Euler steps; exact, which undoes the generator; multi_zoom, the weighted mean over the picture in all
    `zooms` about its centre (`background` around it, by default the recipe's). `readout`: svd, or look_at
    where all training cameras look at the origin upright. `refine`: the folder of a scene in the dataset's frame,
    fitted from training views alone, or built-in; poses are moved to where it shows the picture.
    """

    estimator: Literal["one_step", "euler", "heun", "midpoint", "euler_249", "exact", "multi_zoom"] = "one_step"
    estimator_steps: Steps = 50
    readout: Literal["svd", "look_at"] = "svd"
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

    @field_validator("estimator", mode="before")
    @classmethod
    def _renamed(cls, name: Any) -> Any:
        return RENAMED_ESTIMATORS.get(name, name) if isinstance(name, str) else name


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
