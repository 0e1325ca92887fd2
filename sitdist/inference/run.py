"""A trained run, loaded for use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from sitdist.config.experiment import Config
from sitdist.config.load import read_yaml
from sitdist.dataset.manifest import DatasetManifest, read_manifest
from sitdist.errors import CheckpointError, CodecError
from sitdist.flow.endpoint import Endpoint
from sitdist.flow.estimate import EstimateOptions, PoseEstimate, estimate_pose
from sitdist.flow.interpolant import Interpolant, get_interpolant
from sitdist.flow.predict import guided, velocity_model
from sitdist.flow.sample import SampleOptions, sample_latents
from sitdist.flow.solve import Model
from sitdist.geometry.packing import PoseStatistics, standardize
from sitdist.io.files import read_hashed
from sitdist.model.codec import Codec
from sitdist.runs.averages import use_average
from sitdist.runs.build import build_endpoint, build_model, load_matching_codec
from sitdist.runs.checkpoint import (
    Checkpoint,
    _check_same,
    check_tensors,
    folder_of,
    no_checkpoint,
    read_checkpoint,
    read_newest,
    stored_config,
)

AS_CONFIGURED = ""  # no average has this name


@dataclass(frozen=True)
class LoadedRun:
    """A trained model of the velocity, in eval mode, and everything that is needed to use it."""

    model: nn.Module
    interpolant: Interpolant
    codec: Codec
    manifest: DatasetManifest
    config: Config
    step: int
    endpoint: Endpoint

    @cached_property
    def statistics(self) -> PoseStatistics:
        """The pose statistics of the training data."""
        return PoseStatistics.from_dict(self.manifest.statistics)

    @property
    def latent_shape(self) -> torch.Size:
        """[C, h, w] of the latents."""
        latent = self.manifest.latent
        return torch.Size((latent.channels, latent.height, latent.width))

    def estimate(
        self, latents: Tensor, labels: Tensor, options: EstimateOptions, guidance: tuple[float, str] | None = None
    ) -> PoseEstimate:
        """Poses of latents [B, C, h, w] of objects `labels` [B]; `guidance`: scale and channels of the velocity's."""
        model: Model = self.model if guidance is None else guided(self.model, *guidance)
        return estimate_pose(model, self.interpolant, latents, labels, self.statistics, options, self.endpoint)

    def render(
        self,
        camera_to_world: Tensor,
        intrinsics: Tensor | None,
        labels: Tensor,
        options: SampleOptions,
        seed: int,
        stream: str,
        positions: Tensor,
    ) -> Tensor:
        """Pictures [B, 3, H, W] of poses [B, 4, 4]; `intrinsics` [B, 4] are normalized, where the dataset packs them.

        Noise is keyed by (seed, stream, position).
        """
        latents = sample_latents(
            self.model,
            self.interpolant,
            self.endpoint,
            standardize(camera_to_world, self.statistics, intrinsics),
            labels,
            self.latent_shape,
            options,
            seed,
            stream,
            positions,
        )
        return self.codec.decode(latents)


def load_run(
    run: Path, device: torch.device | str = "cpu", step: int | None = None, average: str | None = AS_CONFIGURED
) -> LoadedRun:
    """Load the newest checkpoint of `run` that reads back whole, or the one of `step`, onto `device`.

    The config is the checkpoint's; of RUN/config.yaml, where there is one, `name`, `data` and `evaluate` are used.
    `average`: the weights, as `evaluate.average` names them (None: the EMA); by default those of the config.
    ConfigError, with both values, where that file disagrees in anything else that a run that goes on may not change.
    """
    run = Path(run)
    checkpoint = read_newest(run, ["ema"]) if step is None else read_checkpoint(folder_of(run, step), ["ema"])
    if checkpoint is None:
        raise no_checkpoint(run)
    config = _config_of(run, checkpoint)
    manifest = _dataset_of(run, checkpoint, config)
    weights = checkpoint.folder / "ema.safetensors"
    loaded = assemble(config, manifest, checkpoint.tensors["ema"], weights, run / "codec", checkpoint.step, device)
    average = config.evaluate.average if average == AS_CONFIGURED else average
    if average is not None:
        use_average(loaded.model, run, loaded.step, average)
    return loaded


def _config_of(run: Path, checkpoint: Checkpoint) -> Config:
    path, stored = run / "config.yaml", checkpoint.state["config"]
    if not path.is_file():
        return stored_config(stored, checkpoint.folder / "state.json")
    beside = stored_config(read_yaml(path, "config"), path)
    config = stored_config(stored, checkpoint.folder / "state.json")
    _check_same(config, beside, f"{path}: ", checkpoint.folder)
    return config.model_copy(update={key: getattr(beside, key) for key in ("name", "data", "evaluate")})


def assemble(
    config: Config,
    manifest: DatasetManifest,
    tensors: Mapping[str, Tensor],
    where: Path,
    codec: Path,
    step: int,
    device: torch.device | str,
) -> LoadedRun:
    """A model with the weights `tensors`, which came from the file `where`, and the codec in the folder `codec`.

    ConfigError, CheckpointError, CodecError where they do not belong together, before the model takes any memory.
    """
    matching = load_matching_codec(codec, manifest, device)
    endpoint = build_endpoint(config.flow)
    interpolant = get_interpolant(config.flow.path, config.flow.prediction)
    model = _model_of(config, manifest, endpoint, tensors, where)
    return LoadedRun(
        model=velocity_model(model, interpolant, config.flow.prediction).to(device).eval().requires_grad_(False),
        interpolant=interpolant,
        codec=matching,
        manifest=manifest,
        config=config,
        step=step,
        endpoint=endpoint,
    )


def _model_of(
    config: Config, manifest: DatasetManifest, endpoint: Endpoint, tensors: Mapping[str, Tensor], where: Path
) -> nn.Module:
    if config.model.sizes()["depth"] > len(tensors):
        raise CheckpointError(f"{where}: {len(tensors)} tensors are too few for model.depth {config.model.depth}")
    try:
        with torch.device("meta"):
            model = build_model(config.model, manifest, endpoint)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0][:160]
        raise CheckpointError(f"{where}: no model has the sizes of its config ({reason})") from None
    check_tensors(model, tensors, where)
    model.to_empty(device="cpu").load_state_dict(dict(tensors))
    return model


def _dataset_of(run: Path, checkpoint: Checkpoint, config: Config) -> DatasetManifest:
    """The manifest that the run keeps of its dataset; CheckpointError if it is not the one that was trained on."""
    path, remedy = run / "dataset.json", f"copy the manifest.json of {config.data} there"
    read_hashed(path, checkpoint.state["dataset"], remedy, CheckpointError)
    return read_manifest(path)


def check_codec(data: Path, manifest: DatasetManifest, loaded: LoadedRun) -> None:
    """CodecError with both values unless the dataset was encoded by the run's codec."""
    ours, theirs = loaded.codec.identity(), manifest.codec
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise CodecError(
                f"{data / 'manifest.json'}: codec {name} {theirs.get(name)} but the run's is {ours.get(name)}; "
                "build the dataset with the codec that the run was trained on"
            )
