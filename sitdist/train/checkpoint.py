"""Checkpoints that are either whole or absent, and what is read back from them.

    RUN/checkpoints/step_00001000/
        model.safetensors  ema.safetensors  optimizer.safetensors   tensors by parameter name
        state.json         the step, the config, the dataset, the world size, versions, the fp16 scaler
        manifest.json      sizes and SHA-256 of the files above, written last

A checkpoint is written beside its final name, flushed to disk, then renamed. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from sitdist.config import Config, load_yaml
from sitdist.data.format import DatasetManifest, read_manifest
from sitdist.errors import CheckpointError, ConfigError
from sitdist.flow.endpoint import Endpoint
from sitdist.flow.path import Path as FlowPath
from sitdist.flow.path import get_path
from sitdist.flow.predict import velocity_model
from sitdist.model.codec import Codec
from sitdist.train.build import build_endpoint, build_model, load_matching_codec

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
Content = bytes | Mapping[str, Tensor]
TENSOR_FILES = ("model", "ema", "optimizer")

# What may differ between a run and its continuation: where things are, how long and how closely it is watched.
MAY_CHANGE = re.compile(
    r"name|data|train\.(steps|max_batch_per_device|log_every|validate_every|validation_views|picture_views"
    r"|checkpoint_every|keep_checkpoints|keep_every|checkpoint_async|compile|activation_checkpointing|layer_norms_every|loss_spike|non_finite\.budget|profile(\..*)?|tracker)"
    r"|evaluate\..*"
)


@dataclass(frozen=True)
class Checkpoint:
    """What is read from one checkpoint: its state, and the tensors of the files that were asked for."""

    folder: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    @property
    def step(self) -> int:
        """How many updates the weights have seen."""
        return self.state["step"]


# ------------------------------------------------------------------------------------------------------------ writing


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates is."""
    return run / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The inverse of `folder_of`."""
    return int(folder.name.removeprefix("step_"))


def save_checkpoint(
    run: Path,
    state: dict[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    keep: int,
    keep_every: int | None = None,
) -> Path:
    """Write the checkpoint of `state["step"]` and then remove all but the newest `keep`; one process calls it.

    Milestones, whose step is a multiple of `keep_every`, are never removed.

    Until the last rename the checkpoint does not exist; a crash at any moment leaves the earlier ones as they were.
    """
    folder = folder_of(run, state["step"])
    unfinished = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        contents: dict[str, Content] = {f"{name}.safetensors": tensors[name] for name in TENSOR_FILES}
        contents["state.json"] = _json({"format_version": FORMAT_VERSION, **state})
        entries = {}
        for name, content in contents.items():
            _write(unfinished / name, content)
            entries[name] = _entry(unfinished / name)
        _write(unfinished / "manifest.json", _json({"format_version": FORMAT_VERSION, "files": entries}))
        _flush_folder(unfinished)
        if folder.exists():  # a damaged one that the run has gone back behind
            os.rename(folder, folder.with_name(f".{folder.name}.damaged-{os.getpid()}"))
        os.rename(unfinished, folder)
        _flush_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{folder}: cannot be written: {reason}; free space and start again") from None
    _remove_old(run, folder, keep, keep_every)
    return folder


def _remove_old(run: Path, newest: Path, keep: int, keep_every: int | None) -> None:
    """Hide, then remove all checkpoints but the newest `keep` and the milestones, and what was left half-removed."""
    try:
        for old in [other for other in list_checkpoints(run) if other <= newest][:-keep]:
            if keep_every is not None and step_of(old) % keep_every == 0:
                continue
            os.rename(old, old.with_name(f".{old.name}.old-{os.getpid()}"))
        remove_unfinished(run)
    except OSError as error:
        log.warning("%s: an old checkpoint cannot be removed: %s", run, error)


def remove_unfinished(run: Path) -> None:
    """Remove what earlier processes left half-written or half-removed; one process calls it, while none is writing."""
    for left in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(left)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: Content) -> None:
    """Bytes, or tensors as .safetensors, flushed to disk; other threads go on meanwhile."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ reading


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run whose manifest is readable and whose files have its sizes, oldest first."""
    folders = sorted((run / "checkpoints").glob("step_*"))
    return [folder for folder in folders if _problem(folder) is None]


def read_checkpoint(folder: Path, files: Iterable[str] = TENSOR_FILES) -> Checkpoint:
    """Read the tensors of `files` and the state; CheckpointError if a file read is not what the manifest says."""
    problem = _problem(folder)
    if problem is not None:
        raise CheckpointError(f"{folder}: {problem}; use an earlier checkpoint")
    entries = json.loads((folder / "manifest.json").read_bytes())["files"]

    def checked(name: str) -> bytes:
        content = (folder / name).read_bytes()
        if _sha256(content) != entries[name]["sha256"]:
            raise CheckpointError(
                f"{folder / name}: SHA-256 {_sha256(content)[:12]}... but its manifest says "
                f"{entries[name]['sha256'][:12]}...; the file is damaged, use an earlier checkpoint"
            )
        return content

    def tensors(name: str) -> dict[str, Tensor]:
        content = checked(name)
        try:
            return tensors_from_bytes(content)
        except SafetensorError as error:
            raise CheckpointError(
                f"{folder / name}: no safetensors file ({error}), and nothing else is read; use an earlier checkpoint"
            ) from None

    state = json.loads(checked("state.json"))
    return Checkpoint(folder, state, {name: tensors(f"{name}.safetensors") for name in files})


def read_newest(run: Path, files: Iterable[str] = TENSOR_FILES) -> Checkpoint | None:
    """The newest checkpoint that reads back whole, or None; says which damaged ones it passed over."""
    for folder in sorted((run / "checkpoints").glob("step_*"), reverse=True):
        try:
            return read_checkpoint(folder, files)
        except CheckpointError as error:
            log.warning("passed over: %s", error)
    return None


def describe_checkpoints(run: Path, verify: bool = False) -> tuple[str, bool]:
    """A line for every checkpoint of `run`, oldest first, and whether all are whole; with `verify` all is read again.

    CheckpointError where there are none.
    """
    folders = sorted((run / "checkpoints").glob("step_*"))
    if not folders:
        raise CheckpointError(f"{run}: holds no checkpoints; give the --out of `sitdist train`")
    lines, whole = [], True
    for folder in folders:
        problem = _problem(folder)
        if problem is None and verify:
            try:
                read_checkpoint(folder)
            except CheckpointError as error:
                problem = str(error).removeprefix(f"{folder}/")
        whole &= problem is None
        lines.append(
            f"{folder.name}  {_size_and_versions(folder, verify)}"
            if problem is None
            else f"{folder.name}  damaged: {problem}"
        )
    return "\n".join(lines), whole


def _size_and_versions(folder: Path, verified: bool) -> str:
    state = json.loads((folder / "state.json").read_bytes())
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    versions = " ".join(f"{name} {version}" for name, version in sorted(state.get("versions", {}).items()))
    what = "whole, every hash is right" if verified else "whole by its sizes"
    return f"{megabytes:.1f} MB  {state.get('world_size', '?')} processes  {versions}  {what}"


def _problem(folder: Path) -> str | None:
    """Why a folder is no checkpoint, as far as can be told without reading its tensors."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        version, entries = manifest["format_version"], manifest["files"]
        sizes = {name: entry["bytes"] for name, entry in entries.items()}
    except FileNotFoundError:
        return "has no manifest.json, so it was never finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is damaged"
    if version != FORMAT_VERSION:
        return f"manifest.json: format_version {version}, but this version of sitdist reads {FORMAT_VERSION}"
    for name in ("state.json", *(f"{name}.safetensors" for name in TENSOR_FILES)):
        path = folder / name
        if name not in sizes or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != sizes[name]:
            return f"{name} has {path.stat().st_size} bytes but its manifest says {sizes[name]}"
    return None


# ----------------------------------------------------------------------------------------------- does it belong here?


def check_same_config(checkpoint: Checkpoint, config: Config) -> None:
    """ConfigError, with the key and both values, unless `config` continues the run of the checkpoint.

    A key that did not exist when the checkpoint was written has its default there.
    """
    stored = checkpoint.state["config"]
    with suppress(ValidationError):  # a key that exists no more is compared as it is
        stored = Config.model_validate(stored).model_dump(mode="json")
    before, now = _flatten(stored), _flatten(config.model_dump(mode="json"))
    for key in [*before, *(key for key in now if key not in before)]:
        if before.get(key) != now.get(key) and not MAY_CHANGE.fullmatch(key):
            raise ConfigError(
                f"{key} is {now.get(key)!r} but {checkpoint.folder} was trained with {before.get(key)!r}; "
                "set it back, or start another run with another --out"
            )


def check_same_dataset(checkpoint: Checkpoint, dataset: Path, fingerprint: str) -> None:
    """CheckpointError unless the dataset is the one the checkpoint was trained on."""
    if checkpoint.state["dataset"] != fingerprint:
        raise CheckpointError(
            f"{dataset / 'manifest.json'}: SHA-256 {fingerprint[:12]}... but {checkpoint.folder} was trained on "
            f"{checkpoint.state['dataset'][:12]}...; give the dataset it was trained on, or start another run"
        )


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copy `tensors` into `model`; CheckpointError naming the first tensor that does not fit."""
    check_tensors(model, tensors, where)
    model.load_state_dict(dict(tensors))


def check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """CheckpointError naming the first of `tensors` that is not as `model` has it."""
    expected = model.state_dict()
    for name in [*expected, *tensors]:
        ours = tuple(expected[name].shape) if name in expected else "absent"
        theirs = tuple(tensors[name].shape) if name in tensors else "absent"
        if ours != theirs:
            raise CheckpointError(
                f"{where}: tensor {name} is {theirs} but the model of the config has {ours}; "
                "it is a checkpoint of another model, give the config it was trained with"
            )


def dataset_fingerprint(dataset: Path) -> str:
    """SHA-256 of the dataset's manifest, which holds the hashes of all its shards."""
    return _sha256((dataset / "manifest.json").read_bytes())


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# ---------------------------------------------------------------------------------------------------- optimizer state


OptimizerState = dict[str, dict[str, Tensor]]  # by parameter name, then by kind, such as exp_avg


def optimizer_tensors(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state of named parameters by name and kind, such as `blocks.0.attn.qkv.weight/exp_avg`."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def check_optimizer(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path) -> OptimizerState:
    """What `optimizer_tensors` gave, by name; CheckpointError naming a state that fits none of the parameters."""
    state: OptimizerState = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"{where}: optimizer state {key} belongs to no trained parameter of the model")
        ours, theirs = tuple(parameters[name].shape), tuple(tensor.shape)
        if theirs not in (ours, ()):  # a scalar counts steps
            raise CheckpointError(f"{where}: optimizer state {key} is {theirs} but the parameter is {ours}")
        state.setdefault(name, {})[kind] = tensor
    return state


def load_optimizer(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """Give the optimizer of named parameters its state, which fits them."""
    names = {parameter: name for name, parameter in parameters.items()}
    trained = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    places = {place: state[name] for place, name in enumerate(trained) if name in state}
    optimizer.load_state_dict({"state": places, "param_groups": optimizer.state_dict()["param_groups"]})


# ------------------------------------------------------------------------------------------------- for the evaluation


@dataclass(frozen=True)
class LoadedRun:
    """A trained model of the velocity and everything that is needed to use it: EMA weights, in eval mode."""

    model: nn.Module
    path: FlowPath
    codec: Codec
    manifest: DatasetManifest
    config: Config
    step: int
    endpoint: Endpoint


def load_run(run: Path, device: torch.device | str = "cpu", step: int | None = None) -> LoadedRun:
    """Load the newest checkpoint of `run` that reads back whole, or the one of `step`, onto `device`."""
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run}: holds no config.yaml, so it is no run; give the --out of `sitdist train`")
    config = load_yaml(Config, run / "config.yaml")
    checkpoint = read_newest(run, ["ema"]) if step is None else read_checkpoint(folder_of(run, step), ["ema"])
    if checkpoint is None:
        raise CheckpointError(f"{run}: has no whole checkpoint; train first with `sitdist train CONFIG --out {run}`")
    manifest = _dataset_of(run, checkpoint)
    weights = checkpoint.folder / "ema.safetensors"
    return assemble(config, manifest, checkpoint.tensors["ema"], weights, run / "codec", checkpoint.step, device)


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

    ConfigError, CheckpointError, CodecError where they do not belong together.
    """
    endpoint = build_endpoint(config.flow)
    path = get_path(config.flow.path, config.flow.prediction)
    model = build_model(config.model, manifest, endpoint)
    load_tensors(model, tensors, where)
    return LoadedRun(
        model=velocity_model(model, path, config.flow.prediction).to(device).eval().requires_grad_(False),
        path=path,
        codec=load_matching_codec(codec, manifest, device),
        manifest=manifest,
        config=config,
        step=step,
        endpoint=endpoint,
    )


def _dataset_of(run: Path, checkpoint: Checkpoint) -> DatasetManifest:
    """The manifest that the run keeps of its dataset; CheckpointError if it is not the one that was trained on."""
    path = run / "dataset.json"
    content = path.read_bytes() if path.is_file() else b""
    if _sha256(content) != checkpoint.state["dataset"]:
        raise CheckpointError(
            f"{path}: missing or altered since {checkpoint.folder.name} was saved; "
            f"copy the manifest.json of {checkpoint.state['config']['data']} there"
        )
    return read_manifest(path)
