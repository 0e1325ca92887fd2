"""Schemas of experiment configs."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

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
from sitdist.flow.choices import (
    RENAMED_ESTIMATORS,
    Diffusion,
    Estimator,
    Generator,
    GuidedChannels,
    LastStep,
    Readout,
    StochasticSolver,
)

SIT_SIZES: dict[str, tuple[int, int, int]] = {  # name: (depth, hidden_size, num_heads), Ma et al. 2024, table 1
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
_SIZES = ("patch_size", "hidden_size", "depth", "num_heads")
SIT_PRESETS = tuple(f"SiT-{size}/{patch}" for size in SIT_SIZES for patch in (2, 4, 8))


class ModelConfig(Schema):
    """The transformer: a published size such as SiT-B/8, or free sizes. The dataset gives the latent's shape."""

    preset: str | None = Field(None, description="Published size, such as SiT-B/8. Give it, or the next four keys.")
    patch_size: Pixels | None = Field(None, description="Side of a patch, in numbers of the latent.")
    hidden_size: Annotated[int, Field(gt=0, le=65536, multiple_of=4)] | None = Field(
        None, description="Width of the transformer; a multiple of num_heads."
    )
    depth: Annotated[int, Field(gt=0, le=1000)] | None = Field(None, description="Number of blocks.")
    num_heads: Annotated[int, Field(gt=0, le=4096)] | None = Field(None, description="Number of attention heads.")
    mlp_ratio: Annotated[float, Field(ge=0.25, le=64)] = Field(
        4.0, description="Hidden width of a block's perceptron, relative to hidden_size."
    )
    mlp: Literal["gelu", "swiglu"] = Field(
        "gelu", description="Perceptron of a block: gelu as published, or swiglu with as many weights."
    )
    num_classes: Annotated[int, Field(gt=0, le=10**6)] = Field(1, description="Number of labels.")
    class_dropout_prob: Share = Field(
        0.1, description="Probability of dropping the label in training, which classifier-free guidance needs."
    )
    learn_sigma: bool = Field(False, description="Double the output channels and ignore half, as published weights do.")
    init_from: Word | None = Field(
        None, description="File of weights to start from: a published SiT checkpoint (.pt), or a .safetensors."
    )

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
    """The interpolant: its path, its end at t = 0, and how t is drawn in training."""

    path: Literal["linear", "gvp", "vp"] = Field("linear", description="Path of the interpolant.")
    endpoint: Literal["pose", "gaussian"] = Field(
        "pose",
        description="What x0 is: gain * pack(pose) + sigma * noise, or gaussian noise with the pose as a condition.",
    )
    sigma: NonNegativeNumber = Field(
        0.1, description="Standard deviation of the noise on the packed pose; 1 with the gaussian endpoint."
    )
    gain: PositiveNumber = Field(1.0, description="Factor of the packed pose.")
    layout: Literal["quadrants", "interleaved"] = Field(
        "quadrants", description="How the four entries of a row of the pose are laid out in their channel."
    )
    prediction: Literal["velocity", "x0", "score"] = Field(
        "velocity", description="What the network predicts; score needs the gaussian endpoint."
    )
    loss_weight: Literal["none", "velocity", "likelihood"] = Field(
        "none", description="Weight of the loss over t, for predictions other than the velocity."
    )
    share_at_one: Share = Field(0.25, description="Share of the samples with t = 1, which trains reading poses.")
    share_at_zero: Share = Field(0.15, description="Share of the samples with t = 0, which trains rendering.")
    weight_at_one: PositiveNumber = Field(1.0, description="Weight of the loss of the samples with t = 1.")

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        """The gaussian endpoint has sigma 1, so that a resolved config reads the same."""
        if isinstance(values, dict) and values.get("endpoint") == "gaussian":
            return {"sigma": 1.0} | values
        return values

    @model_validator(mode="after")
    def _consistent(self) -> FlowConfig:
        one, zero, gaussian = self.share_at_one, self.share_at_zero, self.endpoint == "gaussian"
        if gaussian and (self.sigma, self.gain, self.layout) != (1.0, 1.0, "quadrants"):
            raise ValueError(
                f"the gaussian endpoint is N(0, 1) and packs no pose, but sigma {self.sigma:g}, gain {self.gain:g} and "
                f"layout {self.layout} are given; leave them out, or set endpoint: pose"
            )
        if one + zero > 1:
            raise ValueError(f"share_at_one + share_at_zero is {one + zero:g}, more than 1")
        if self.weight_at_one != 1 and one == 0:
            raise ValueError(f"weight_at_one is {self.weight_at_one:g}, but no times are 1; raise share_at_one")
        if self.path == "vp" and one + zero > 0:
            raise ValueError("the vp path's velocity is infinite at t = 1; set both shares to 0, or path: linear")
        if gaussian and one == 1:
            raise ValueError("the gaussian endpoint at t = 1 alone neither renders nor reads poses; lower share_at_one")
        if self.prediction == "score" and not gaussian:
            raise ValueError(
                f"prediction score needs the gaussian endpoint, not '{self.endpoint}', because score = -E[x0 | x_t] / "
                "sigma(t) holds for x0 ~ N(0, I) only; set prediction to velocity or x0"
            )
        if self.prediction == "velocity" and self.loss_weight != "none":
            raise ValueError(
                f"loss_weight {self.loss_weight} weights the errors of x0 or the score, and the prediction is velocity;"
                " set it to none, or prediction to x0"
            )
        if one > 0 and self.loss_weight == "likelihood":
            raise ValueError("at t = 1 the likelihood weight is infinite; set share_at_one to 0")
        if one > 0 and self.prediction == "score":
            raise ValueError("at t = 1 the loss says nothing of the score; set share_at_one to 0")
        if zero > 0 and self.loss_weight != "none":
            raise ValueError(f"at t = 0 the {self.loss_weight} weight is infinite; set share_at_zero to 0")
        return self

    def why_no_pose(self) -> str | None:
        """Why a model that was trained so reads no pose off a picture; None if it does."""
        if self.endpoint == "gaussian":
            return "the gaussian endpoint is noise and holds no pose"
        return "the model was trained at t = 0 alone" if self.share_at_zero == 1 else None

    def why_no_picture(self) -> str | None:
        """Why a model that was trained so renders no picture of a pose; None if it does."""
        return "the model was trained at t = 1 alone, as a regressor of the pose" if self.share_at_one == 1 else None


class AppearanceConfig(Schema):
    """How the views that train reading poses (t = 1) may look; it is drawn anew whenever a view is visited.

    Backgrounds, mattes, shadows, occluders, light, blur, noise and compression vary. Rendering sees clean views. The
    dataset must be built with keep_views.
    """

    strength: Annotated[float, Field(ge=0, le=3)] = Field(1.0, description="Scale of all variations; 0 is none.")
    pictures: Word | None = Field(
        None, description="Folder of pictures to use as backgrounds, beside plain colours and random textures."
    )
    roll_deg: Annotated[float, Field(ge=0, le=180)] = Field(
        0.0, description="Largest roll to turn cameras by, to either side; the pose turns along."
    )
    turn_deg: Annotated[float, Field(ge=0, le=30)] = Field(
        0.0, description="Largest angle to turn cameras by to the sides, up and down; the pose turns along."
    )
    zoom: Annotated[float, Field(ge=1, le=2)] = Field(
        1.0, description="Largest factor on the focal length, up or down; needs packing: intrinsics."
    )

    @property
    def moves_cameras(self) -> bool:
        """Whether the cameras of varied views are turned or zoomed."""
        return self.roll_deg > 0 or self.turn_deg > 0 or self.zoom > 1


class OptimizerConfig(Schema):
    """The optimizer: torch.optim.AdamW or SGD."""

    kind: Literal["adamw", "sgd"] = Field("adamw", description="AdamW or SGD.")
    lr: PositiveNumber = Field(1e-4, description="Largest learning rate.")
    betas: Betas = Field((0.9, 0.999), description="AdamW's decay rates of the two moments.")
    weight_decay: NonNegativeNumber = Field(0.0, description="Weight decay.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="SGD's momentum.")
    clip_norm: PositiveNumber | None = Field(1.0, description="Largest norm of the gradient; null does not clip.")


class ScheduleConfig(Schema):
    """The learning rate over the steps: a linear warm-up, then constant or half a cosine."""

    kind: Literal["constant", "cosine"] = Field("cosine", description="Course after the warm-up.")
    warmup_steps: NonNegative = Field(0, description="Number of steps of the linear warm-up.")
    final_ratio: Share = Field(0.0, description="Last learning rate of the cosine, relative to the largest.")


class AveragesConfig(Schema):
    """Averages of the weights beside that of ema_decay, saved with every checkpoint, for `sitdist ema`."""

    decays: list[Annotated[float, Field(ge=0, lt=1)]] = Field([], description="Decay rates of exponential averages.")
    sigma_rels: list[Annotated[float, Field(gt=0, lt=0.288)]] = Field(
        [], description="Relative widths of averages by power profiles."
    )
    snapshot_every: Positive | None = Field(
        None, description="Also keep the averages of every N-th step, for good; null keeps none."
    )

    @model_validator(mode="after")
    def _some(self) -> AveragesConfig:
        if not self.decays and not self.sigma_rels:
            raise ValueError("averages names none; give decays such as [0.99], or sigma_rels such as [0.05, 0.1]")
        if len(set(self.decays)) < len(self.decays) or len(set(self.sigma_rels)) < len(self.sigma_rels):
            raise ValueError("averages names one twice; keep one of them")
        return self


class ProfileConfig(Schema):
    """Which steps to profile."""

    start: NonNegative = Field(10, description="Number of steps before the first profiled one.")
    steps: Positive = Field(3, description="Number of profiled steps.")


class NonFiniteConfig(Schema):
    """What happens when a loss or a gradient is not finite: the step changes nothing, and the run goes on."""

    in_a_row: Positive = Field(10, description="After so many in a row, go back to the last checkpoint before them.")
    budget: NonNegative = Field(100, description="After more than so many in all, stop.")


class TrainConfig(Schema):
    """One training run. Gradient accumulation follows from global_batch and the number of processes."""

    steps: Positive = Field(description="Number of steps.")
    global_batch: Annotated[int, Field(gt=0, le=10**6)] = Field(description="Samples per step, over all processes.")
    max_batch_per_device: Positive | None = Field(
        None, description="Largest batch of one forward pass on a device; larger ones are accumulated."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "fp32", description="Precision of the forward pass; auto is bf16 where the device computes in it, else fp32."
    )
    deterministic: bool = Field(False, description="Use deterministic algorithms only.")
    compile: Literal["off", "blocks", "full", "graphs"] = Field(
        "off",
        description="torch.compile: every block by itself, the full model, or that and replayed as a CUDA graph.",
    )
    activation_checkpointing: Literal["off", "selective", "all"] = Field(
        "off",
        description="What blocks compute again in the backward pass: all but matrix products (selective), or all.",
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimizer.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="The learning rate over the steps.")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.9999, description="Decay of the average of the weights.")
    averages: AveragesConfig | None = Field(None, description="Further averages of the weights.")
    log_every: Positive = Field(10, description="Steps between log lines.")
    validate_every: Positive | None = Field(None, description="Steps between validations; null validates never.")
    validation_views: Positive = Field(64, description="Number of views in a validation.")
    picture_views: Positive = Field(8, description="Number of views whose pictures a validation logs.")
    checkpoint_every: Positive | None = Field(None, description="Steps between checkpoints; null: only the last.")
    keep_checkpoints: Positive = Field(3, description="Number of newest checkpoints to keep.")
    keep_every: Positive | None = Field(None, description="Also keep the checkpoint of every N-th step, for good.")
    checkpoint_async: bool = Field(True, description="Write checkpoints from a host copy while training goes on.")
    layer_norms_every: Positive | None = Field(None, description="Steps between logs of all layers' norms; null: none.")
    loss_spike: Annotated[float, Field(gt=1)] | None = Field(
        3.0, description="Warn of a loss that is this many times the median of the last ones; null never warns."
    )
    non_finite: NonFiniteConfig = Field(NonFiniteConfig(), description="When a loss or a gradient is not finite.")
    profile: ProfileConfig | None = Field(None, description="Which steps to profile; null profiles none.")
    tracker: Literal["wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"] | None = Field(
        None, description="A tracker of Accelerate's to log to, beside TensorBoard."
    )

    @model_validator(mode="after")
    def _layers_to_be_seen(self) -> TrainConfig:
        if self.layer_norms_every is not None and self.compile != "off":
            raise ValueError(
                f"layer_norms_every looks at layers from outside, which compile: {self.compile} hides; remove one"
            )
        return self


class EvaluateConfig(Schema):
    """How pictures are generated and poses estimated in validation, in evaluation, and by a loaded model."""

    estimator: Estimator = Field(
        "one_step",
        description="How a pose is read: the posterior mean at t = 1 (one_step); integrating backward (euler, heun, "
        "midpoint); 249 explicit Euler steps (euler_249); undoing the generator (exact); the weighted mean over zooms "
        "(multi_zoom).",
    )
    estimator_steps: Steps = Field(50, description="Number of steps of the estimators euler, heun and midpoint.")
    readout: Readout = Field(
        "svd",
        description="How a pose is fitted to its sixteen entries: nearest rotation (svd), or a level "
        "camera that looks at the origin (look_at).",
    )
    zooms: Annotated[list[Annotated[float, Field(ge=0.01, le=100)]], Field(min_length=1, max_length=100)] = Field(
        [0.75, 0.9, 1.0, 1.1, 1.25], description="Zooms about the picture's centre of the estimator multi_zoom."
    )
    background: Colour | None = Field(None, description="Colour around a picture zoomed out; null: the recipe's.")
    refine: Word | None = Field(
        None,
        description="Move poses to where a scene shows the picture: a fitted scene's folder, or built-in. The scene "
        "has to be fitted to training views alone.",
    )
    generator: Generator = Field(
        "heun",
        description="Solver that renders. Adaptive ones (from dopri5 on) choose their steps for the whole batch; "
        "euler_maruyama and stochastic_heun need the gaussian endpoint.",
    )
    generator_steps: Steps = Field(10, description="Number of steps of the generator.")
    tolerance: PositiveNumber = Field(1e-6, description="Error tolerance of adaptive generators and implicit_adams.")
    guidance: NonNegativeNumber | None = Field(
        None, description="Scale of classifier-free guidance; null is off. Needs model.class_dropout_prob above 0."
    )
    guidance_channels: GuidedChannels = Field("all", description="Channels that are guided: all, or the first three.")
    diffusion: Diffusion = Field("SBDM", description="Diffusion coefficient of stochastic generators.")
    diffusion_norm: PositiveNumber = Field(1.0, description="Factor of the diffusion coefficient.")
    last_step: LastStep | None = Field("Mean", description="Last, noiseless step of stochastic generators; null: none.")
    last_step_size: Annotated[float, Field(gt=0, lt=1)] = Field(0.04, description="Size of that last step, in t.")
    batch: Positive = Field(64, description="Number of views per batch.")
    average: Word | None = Field(
        None,
        description="Weights to use: one of train.averages such as decay_0.99, or a file that `sitdist ema` wrote; "
        "null takes the average of ema_decay.",
    )
    seed: Seed = Field(0, description="Seed of the noise.")
    lpips_backbone: Word | None = Field(
        None, description="File of torchvision's AlexNet or VGG weights, which LPIPS needs; null leaves LPIPS out."
    )

    @field_validator("estimator", mode="before")
    @classmethod
    def _renamed(cls, name: Any) -> Any:
        return RENAMED_ESTIMATORS.get(name, name) if isinstance(name, str) else name


class ReaderConfig(Schema):
    """How training samples are read. Only split_by_node and replaced samples change what a batch holds."""

    workers: Annotated[int, Field(gt=0, le=1024)] = Field(2, description="Number of threads that read ahead.")
    resident: bool = Field(False, description="Keep all samples on the device.")
    on_bad_sample: Literal["stop", "replace"] = Field("stop", description="Stop at a damaged sample, or replace it.")
    max_bad_samples: NonNegative = Field(10, description="Number of samples that a process may replace.")
    cache: Word | None = Field(None, description="Cache of datasets behind a URL; null is ~/.cache/sitdist.")
    cache_gb: PositiveNumber = Field(50.0, description="Size of that folder in GB.")
    split_by_node: bool = Field(
        False, description="Let every node read only its own share of the shards; batches then depend on the nodes."
    )


class Config(Schema):
    """An experiment: which dataset, which model, which flow, how it is trained and evaluated."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=100)] = Field(description="Name of experiment.")
    data: Word = Field(description="Folder or fsspec URL of the dataset.")
    seed: Seed = Field(0, description="Seed of the weights, the sample order and the noise.")
    model: ModelConfig = Field(description="The transformer.")
    flow: FlowConfig = Field(FlowConfig(), description="The interpolant.")
    appearance: AppearanceConfig | None = Field(
        None, description="How the views that train reading poses may look; null shows them as they are."
    )
    train: TrainConfig = Field(description="The training run.")
    reader: ReaderConfig = Field(ReaderConfig(), description="How training samples are read.")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="How pictures are generated and poses estimated.")

    @model_validator(mode="after")
    def _generates(self) -> Config:
        evaluate, flow = self.evaluate, self.flow
        if self.appearance is not None and (flow.share_at_one == 0 or flow.why_no_pose() is not None):
            reason = flow.why_no_pose() or "flow.share_at_one is 0"
            raise ValueError(f"appearance varies the views that train reading poses, but {reason}; leave it out")
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
