"""Checkpoints that are either whole or absent, and what is read back from them.

    RUN/checkpoints/step_00001000/
        model.safetensors  ema.safetensors  optimizer.safetensors   tensors by parameter name
        state.json         the step, the config, the dataset, the world size, versions, the fp16 scaler
        manifest.json      sizes and SHA-256 of the files above, written last

A checkpoint is written beside its final name, flushed to disk, then renamed. Nothing is ever unpickled.
The config and the dataset in state.json decide how the weights are used; files of the run that disagree are refused.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from sitdist.config.experiment import Config
from sitdist.config.load import parse
from sitdist.config.schema import NonNegative, Positive, S, Schema
from sitdist.errors import CheckpointError, ConfigError, one_line
from sitdist.io.atomic import (
    PREFIX,
    cannot_write,
    check_free,
    file_sha256,
    remove,
    temporary_name,
    write_atomically,
    write_folder,
)
from sitdist.io.files import parse_json, read_hashed, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FORMAT_VERSION = 1
TENSOR_FILES = ("model", "ema", "optimizer")
FILES = {"state.json", *(f"{name}.safetensors" for name in TENSOR_FILES)}
REMEDY = "use an earlier checkpoint"
NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")
LEFT_BEHIND = re.compile(  # by a process that was killed while it wrote or removed, also of earlier versions
    rf"{re.escape(PREFIX)}[0-9a-f]{{8}}-[0-9]+-[0-9a-f]{{8}}\.tmp"
    r"|\.step_[0-9]{8,}(\.(tmp|old|damaged)-[0-9]+|\.safetensors\.tmp)"
)

# What may differ between a run and its continuation, and between a checkpoint and the config.yaml beside it: where
# things are (`data` may have moved), how long it is trained, how closely it is watched, and how it is evaluated.
MAY_CHANGE = re.compile(
    r"name|data|train\.(steps|max_batch_per_device|log_every|validate_every|validation_views|picture_views"
    r"|checkpoint_every|keep_checkpoints|keep_every|checkpoint_async|compile|activation_checkpointing|layer_norms_every|loss_spike|non_finite\.budget|profile(\..*)?|tracker)"
    r"|evaluate\..*"
)

# Keys of earlier versions, which every stored config of theirs holds. They chose among estimators that are no more.
REMOVED_KEYS = (("evaluate", "estimator_draws"), ("evaluate", "estimator_time"))


class _File(Schema):
    bytes: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Sha256


class _Manifest(Schema):
    """manifest.json of a checkpoint."""

    format_version: int
    files: dict[str, _File]


class _State(Schema):
    """The required contents of state.json; there may be more."""

    model_config = ConfigDict(extra="allow")

    step: NonNegative
    config: dict[str, Any]
    dataset: Sha256
    world_size: Positive = 1
    left_out: Annotated[dict[Literal["total", "in_a_row", "rollbacks"], NonNegative], Field(min_length=3)] | None = None
    precision: str | None = None
    scaler: dict[str, float] | None = None
    versions: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint: its state, and the tensors of the files that were read."""

    folder: Path
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    @property
    def step(self) -> int:
        """How many updates the weights have seen."""
        return self.state["step"]


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates is."""
    return run / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The inverse of `folder_of`."""
    return int(folder.name.removeprefix("step_"))


def save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    from safetensors import torch  # which imports torch itself

    torch.save_file(tensors, path)


def save_checkpoint(
    run: Path,
    state: dict[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    keep: int,
    keep_every: int | None = None,
) -> Path:
    """Write the checkpoint of `state["step"]` and then remove all but the newest `keep`; one process calls it.

    Steps that are multiples of `keep_every` are never removed. Until the last rename the checkpoint does not exist; a
    crash at any moment leaves the earlier ones as they were.
    """
    folder = folder_of(run, state["step"])

    def write(temporary: Path) -> None:
        temporary.mkdir()
        for name in TENSOR_FILES:
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors[name].items()}
            save_file(plain, temporary / f"{name}.safetensors")
        write_json(temporary / "state.json", {"format_version": FORMAT_VERSION, **state})
        written = [temporary / name for name in sorted(FILES)]
        files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in written}
        write_json(temporary / "manifest.json", {"format_version": FORMAT_VERSION, "files": files})

    if folder.exists():  # a damaged one that the run has gone back behind
        try:
            hidden = temporary_name(folder)
            os.rename(folder, folder.with_name(f"{folder.name}.{hidden.stem[-8:]}") if _foreign(folder) else hidden)
        except OSError as error:
            raise cannot_write(folder, error) from None
    write_folder(folder, write)
    _remove_old(run, folder, keep, keep_every)
    return folder


def _foreign(folder: Path) -> set[str]:
    """Names in a checkpoint's folder that sitdist did not write; such a folder is never removed."""
    return {path.name for path in folder.iterdir()} - FILES - {"manifest.json"}


def _remove_old(run: Path, newest: Path, keep: int, keep_every: int | None) -> None:
    """Hide, then remove all checkpoints but the newest `keep` and the milestones; also clean up unfinished ones."""
    try:
        for old in [other for other in list_checkpoints(run) if step_of(other) <= step_of(newest)][:-keep]:
            if keep_every is not None and step_of(old) % keep_every == 0:
                continue
            if foreign := _foreign(old):
                log.warning("%s: kept, as it holds %s", old, one_line(min(foreign)))
            else:
                os.rename(old, temporary_name(old))
        remove_unfinished(run)
    except OSError as error:
        log.warning("%s: an old checkpoint cannot be removed: %s", run, error)


def remove_unfinished(run: Path) -> None:
    """Remove what killed processes left half-written or half-removed; one process calls it, while none writes."""
    for left in [*(run / "checkpoints").glob(".s*"), *(run / "averages").glob(".s*")]:
        if LEFT_BEHIND.fullmatch(left.name):
            remove(left)


def _folders(run: Path) -> list[Path]:
    """The folders that have the name of a checkpoint, oldest first."""
    named = [folder for folder in (run / "checkpoints").glob("step_*") if NAME.fullmatch(folder.name)]
    return sorted((folder for folder in named if folder.is_dir()), key=step_of)


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run with a readable manifest and files of the right sizes, oldest first."""
    whole = []
    for folder in _folders(run):
        with suppress(CheckpointError):
            _files(folder)
            whole.append(folder)
    return whole


def read_checkpoint(folder: Path, files: Iterable[str] = TENSOR_FILES) -> Checkpoint:
    """Read the state and the tensors of `files`; CheckpointError if a hash differs from the manifest."""
    known, path = _files(folder), folder / "state.json"
    content = read_hashed(path, known[path.name].sha256, REMEDY, CheckpointError)
    state = parse_json(content, str(path), REMEDY, CheckpointError)
    if checked(_State, state, path).step != step_of(folder):
        raise CheckpointError(f"{path}: of step {state['step']!r:.40}, which is not this folder's; {REMEDY}")
    tensors = {}
    for name in files:
        from sitdist.io.arrays import read_tensors  # torch is slow to import, and the state needs none of it

        path = folder / f"{name}.safetensors"
        tensors[name] = read_tensors(path, known[path.name].sha256, REMEDY, CheckpointError)
    return Checkpoint(folder, state, tensors)


def read_newest(run: Path, files: Iterable[str] = TENSOR_FILES) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None; logs the damaged ones that it passed over."""
    for folder in reversed(_folders(run)):
        try:
            return read_checkpoint(folder, files)
        except CheckpointError as error:
            log.warning("passed over: %s", one_line(str(error)))
    return None


def describe_checkpoints(run: Path, verify: bool = False) -> tuple[str, bool]:
    """A line for every checkpoint of `run`, oldest first, and whether all are whole; `verify` reads every file.

    CheckpointError if there are none.
    """
    folders = _folders(run)
    if not folders:
        raise CheckpointError(f"{run}: holds no checkpoints; give the --out of `sitdist train`")
    lines, whole = [], True
    for folder in folders:
        try:
            state = read_checkpoint(folder, TENSOR_FILES if verify else ()).state
            megabytes = sum(file.bytes for file in _files(folder).values()) / 1e6
            versions = " ".join(f"{name} {version}" for name, version in sorted(state.get("versions", {}).items()))
            what = "whole, every hash is right" if verify else "whole by its sizes"
            said = f"{megabytes:.1f} MB  {state.get('world_size', '?')} processes  {versions}  {what}"
        except CheckpointError as error:
            said = f"damaged: {str(error).removeprefix(str(folder)).lstrip('/: ').removesuffix(f'; {REMEDY}')}"
            whole = False
        lines.append(one_line(f"{folder.name}  {said}"))
    return "\n".join(lines), whole


def _files(folder: Path) -> dict[str, _File]:
    """The files that manifest.json lists; CheckpointError if one is missing or has another size."""
    path = folder / "manifest.json"
    try:
        if not path.is_file():
            raise CheckpointError(f"{folder}: has no manifest.json, so it was never finished; {REMEDY}")
        values = read_json(path, REMEDY, CheckpointError)
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format_version {version!r:.80}, but this version of sitdist reads {FORMAT_VERSION}; {REMEDY}"
            )
        files = checked(_Manifest, values, path).files
        if set(files) != FILES:
            odd = min(set(files) ^ FILES)
            raise CheckpointError(f"{path}: {'does not list' if odd in FILES else 'lists'} {odd[:80]}; {REMEDY}")
        for name, file in files.items():
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}: {name} is missing; {REMEDY}")
            size = (folder / name).stat().st_size
            if size != file.bytes:
                raise CheckpointError(f"{folder}: {name} has {size} bytes but its manifest says {file.bytes}; {REMEDY}")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}); {REMEDY}") from None
    return files


def checked(schema: type[S], values: dict[str, Any], path: Path, remedy: str = REMEDY) -> S:
    """Values read from `path`, validated by `schema`; CheckpointError if they do not fit."""
    try:
        return parse(schema, values, str(path))
    except ConfigError as error:
        raise CheckpointError(f"{error}; {remedy}") from None


def check_same_config(checkpoint: Checkpoint, config: Config) -> None:
    """ConfigError, with the key and both values, unless `config` continues the run of the checkpoint.

    A key that did not exist when the checkpoint was written has its default there.
    """
    stored = parse(Config, _current(checkpoint.state["config"]), str(checkpoint.folder / "state.json"))
    _check_same(stored, config, "", checkpoint.folder)


def _check_same(stored: Config, config: Config, where: str, folder: Path) -> None:
    """What MAY_CHANGE is not compared."""
    before, now = flatten(stored.model_dump(mode="json")), flatten(config.model_dump(mode="json"))
    for key in [*before, *(key for key in now if key not in before)]:
        if before.get(key) != now.get(key) and not MAY_CHANGE.fullmatch(key):
            raise ConfigError(
                f"{where}{key} is {now.get(key)!r} but {folder} was trained with {before.get(key)!r}; "
                "set it back, or start another run with another --out"
            )


def stored_config(values: dict[str, Any], where: Path) -> Config:
    """The config of a checkpoint or an export; ConfigError if it is none.

    An unknown key of `train`, `reader` or `evaluate`, on which the weights do not depend, is dropped with a warning. An
    unknown key of the model or the flow is an error.
    """
    values = _current(values)
    try:
        return Config.model_validate(values)
    except UnicodeEncodeError:  # text with half a surrogate pair, which `parse` tells
        unknown = []
    except ValidationError as error:
        unknown = [each["loc"] for each in error.errors() if each["type"] == "extra_forbidden"]
    for location in unknown:
        if location[0] in ("train", "reader", "evaluate"):
            log.warning("%s: %s: not known to this version, left out", where, one_line(".".join(map(str, location))))
            values = _without(values, location)
    return parse(Config, values, str(where))


def _current(values: dict[str, Any]) -> dict[str, Any]:
    """A stored config without REMOVED_KEYS."""
    for location in REMOVED_KEYS:
        values = _without(values, location)
    return values


def _without(values: dict[Any, Any], location: Sequence[str | int]) -> dict[Any, Any]:
    """`values` less the key at `location`; all of them where there is none."""
    first, *rest = location
    if rest:
        inner = values.get(first)
        return values | {first: _without(inner, rest)} if isinstance(inner, dict) else values
    return {key: value for key, value in values.items() if key != first}


def check_same_dataset(checkpoint: Checkpoint, dataset: Path, fingerprint: str) -> None:
    """CheckpointError unless the dataset is the one the checkpoint was trained on."""
    if checkpoint.state["dataset"] != fingerprint:
        raise CheckpointError(
            f"{dataset / 'manifest.json'}: SHA-256 {fingerprint[:12]}... but {checkpoint.folder} was trained on "
            f"{checkpoint.state['dataset'][:12]}...; give the dataset it was trained on, or start another run"
        )


def check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """CheckpointError naming the first tensor that `model` does not have, or has in another shape."""
    expected = model.state_dict()
    for name in [*expected, *tensors]:
        ours = tuple(expected[name].shape) if name in expected else "absent"
        theirs = tuple(tensors[name].shape) if name in tensors else "absent"
        if ours != theirs:
            raise CheckpointError(
                f"{where}: tensor {name[:80]} is {theirs} but the model of the config has {ours}; "
                "it is a checkpoint of another model, give the config it was trained with"
            )


def no_checkpoint(run: Path) -> CheckpointError:
    """The error for a folder without a checkpoint that can be used."""
    return CheckpointError(f"{run}: has no whole checkpoint; give the --out of `sitdist train`, or train first")


def dataset_fingerprint(dataset: Path) -> str:
    """SHA-256 of the dataset's manifest, which holds the hashes of all its shards."""
    return file_sha256(dataset / "manifest.json")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def convert(source: Path, out: Path, step: int | None = None, weights: Literal["ema", "model"] = "ema") -> str:
    """Write the weights of `source` to `out`, as safetensors or, for a `.pt`, with torch.save; returns a summary line.

    source: a run (at `step`, by default its newest whole checkpoint; its EMA or its model), or a file that
    `model.init_from` takes. The tensors have the names of the published SiT code, which can load the file. ConfigError,
    CheckpointError; `out` is written whole or not at all.
    """
    from sitdist.model.pretrained import read_weights

    if out.suffix not in (".safetensors", ".pt"):
        raise ConfigError(f"{out}: what is to be written shows in the name; end it with .safetensors or .pt")
    check_free(out)
    if source.is_file():
        if step is not None:
            raise ConfigError(f"--step {step}: {source} is one file, which holds one step; leave it out")
        tensors, where = read_weights(source), str(source)
    else:
        checkpoint = (
            read_newest(source, [weights]) if step is None else read_checkpoint(folder_of(source, step), [weights])
        )
        if checkpoint is None:
            raise no_checkpoint(source)
        tensors, where = checkpoint.tensors[weights], f"{checkpoint.folder / weights}.safetensors"
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(out, lambda path: (_save_pt if out.suffix == ".pt" else save_file)(plain, path))
    numbers = sum(tensor.numel() for tensor in plain.values())
    return f"{out}: {len(plain)} tensors, {numbers:,} numbers, of {where}"


def _save_pt(tensors: dict[str, Tensor], path: Path) -> None:
    import torch

    with path.open("wb") as file:
        try:
            torch.save(tensors, file)
        except RuntimeError as error:  # which is what torch says where the file raised another
            raise error.__context__ or error from None
