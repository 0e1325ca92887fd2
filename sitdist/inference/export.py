"""Export a run as a folder with all that inference needs and nothing else, ready for a hub.

config.json          what the model is, what its training pictures have in common, the SHA-256 of its weights
model.safetensors    averaged weights (EMA)
manifest.json        the dataset's: pose statistics, objects and their frames, the codec's identity; no shards
codec/               pixels <-> latents
README.md            a model card with the run's measured results
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import sitdist
from sitdist.config.schema import NonNegative, Schema
from sitdist.dataset.manifest import DatasetManifest, read_manifest
from sitdist.errors import CheckpointError, SitdistError
from sitdist.flow.predict import VelocityModel
from sitdist.inference.calibration import FILE as CALIBRATION
from sitdist.inference.calibration import RunCalibration, read_calibration
from sitdist.inference.preprocess import Preprocess, preprocess_of
from sitdist.inference.run import LoadedRun, assemble, load_run
from sitdist.io.arrays import read_tensors
from sitdist.io.atomic import check_free, file_sha256, write_folder
from sitdist.io.files import read_json, write_json
from sitdist.runs.checkpoint import Sha256, checked, stored_config

FORMAT = "sitdist model"
FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
REMEDY = "export the run again"


class _Card(Schema):
    """config.json of an export."""

    format: str
    format_version: int
    versions: dict[str, str]
    step: NonNegative
    weights_sha256: Sha256
    framing: dict[str, Any]  # of Preprocess; the file format keeps the name
    config: dict[str, Any]


def export_run(
    run: Path, out: Path, step: int | None = None, results: Callable[[Path, int], str] | None = None
) -> LoadedRun:
    """Export the run's newest checkpoint, or that of `step`, to the new folder `out`, whole or not at all.

    `results(run, step)` gives the measured results for the model card, in Markdown.
    DataError if `out` exists or cannot be written; whatever `load_run` raises.
    """
    check_free(out)
    loaded = load_run(run, "cpu", step)
    preprocess = preprocess_of(loaded.manifest, Path(loaded.config.data))
    manifest, calibration = without_shards(loaded.manifest), read_calibration(run)
    card = model_card(loaded, preprocess, results(run, loaded.step) if results else "", calibration)

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        save_file(_weights(loaded), folder / WEIGHTS)
        loaded.codec.save(folder / "codec")
        if calibration is not None:
            write_json(folder / CALIBRATION, calibration.to_dict() | {"dataset": manifest.name})
        (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1) + "\n")
        write_json(folder / "config.json", _description(loaded, preprocess, file_sha256(folder / WEIGHTS)))
        (folder / "README.md").write_text(card)

    write_folder(out, write)
    return loaded


def _weights(loaded: LoadedRun) -> dict[str, Tensor]:
    model = loaded.model.network if isinstance(loaded.model, VelocityModel) else loaded.model
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def without_shards(manifest: DatasetManifest) -> DatasetManifest:
    """The manifest without its shards, and without the folders in which its sources lay."""
    values = manifest.model_dump(mode="json")
    for split in values["splits"].values():
        split["shards"] = []
    recipe = values["recipe"]
    for sources in recipe["splits"].values():
        for source in sources if isinstance(sources, list) else [sources]:
            for key in ("path", "scene"):
                if source.get(key):
                    source[key] = Path(source[key]).name
            if source.get("paths"):
                source["paths"] = [Path(path).name for path in source["paths"]]
    if recipe["codec"].get("path"):
        recipe["codec"]["path"] = Path(recipe["codec"]["path"]).name
    return DatasetManifest.model_validate(values)


def _description(loaded: LoadedRun, preprocess: Preprocess, weights_sha256: str) -> dict[str, Any]:
    config = loaded.config.model_dump(mode="json")
    config["data"] = loaded.manifest.name
    config["evaluate"]["refine"] = None
    config["evaluate"]["average"] = None  # the weights are that average already
    if config["model"].get("init_from"):
        config["model"]["init_from"] = Path(config["model"]["init_from"]).name
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {"sitdist": sitdist.__version__, "torch": torch.__version__},
        "step": loaded.step,
        "weights_sha256": weights_sha256,
        "framing": preprocess.to_dict(),
        "config": config,
    }


# ------------------------------------------------------------------------------------------------------------- reading


def is_exported(folder: Path) -> bool:
    """Whether a folder is an export rather than a run."""
    return (folder / "config.json").is_file() and not (folder / "config.yaml").is_file()


def load_exported(folder: Path, device: torch.device | str = "cpu") -> tuple[LoadedRun, Preprocess]:
    """What `export_run` wrote; CheckpointError, CodecError, ConfigError, DataError for what is damaged or missing."""
    path, weights = folder / "config.json", folder / WEIGHTS
    values = read_json(path, REMEDY, CheckpointError)
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {values.get('format')!r:.80}, which is no sitdist model; export one")
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {values.get('format_version')!r:.80} but this sitdist reads {FORMAT_VERSION}; "
            "export the run again, or use the version of sitdist that wrote it"
        )
    card = checked(_Card, values, path, REMEDY)
    if not (folder / "manifest.json").is_file():
        raise CheckpointError(f"{folder / 'manifest.json'}: missing; {REMEDY}")
    config, manifest = stored_config(card.config, path), read_manifest(folder / "manifest.json")
    try:
        preprocess = Preprocess.from_dict(card.framing)
    except SitdistError as error:
        raise CheckpointError(f"{path}: {error}; {REMEDY}") from None
    if preprocess.size != manifest.image_size:
        raise CheckpointError(
            f"{path}: framing.size {preprocess.size}, not {manifest.image_size} as the data; {REMEDY}"
        )
    tensors = read_tensors(weights, card.weights_sha256, REMEDY, CheckpointError)
    return assemble(config, manifest, tensors, weights, folder / "codec", card.step, device), preprocess


# ---------------------------------------------------------------------------------------------------------- model card


def model_card(loaded: LoadedRun, preprocess: Preprocess, results: str, calibration: RunCalibration | None) -> str:
    """README.md of an export, with the metadata that the hub reads."""
    name, manifest = loaded.config.name, loaded.manifest
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    low, high = manifest.splits["train"].radius
    latent = manifest.latent
    camera = (
        "not known"
        if preprocess.camera is None
        else "fx {:.2f}, fy {:.2f}, cx {:.2f}, cy {:.2f} pixels".format(*preprocess.camera.to_list())
    )
    objects = ", ".join(f"{entry.label}: {entry.name}" for entry in manifest.objects)
    moved = [entry.name for entry in manifest.objects if entry.similarity is not None]
    frames = (
        f'`frame="dataset"`, or `frame="user"`: that of the photos of {", ".join(moved)}'
        if moved
        else "the dataset's own"
    )
    bars = (
        "none: `sitdist calibrate RUN --split SPLIT` before the export puts them here"
        if calibration is None
        else f"50% and 90%, and trust, fitted on {calibration.views} views of `{calibration.split}` for the "
        f"estimator `{calibration.estimator.get('estimator')}`, read out by `{calibration.estimator.get('readout')}`"
    )
    results = results or "None measured yet: `sitdist eval RUN` before the export puts them here."
    return f"""---
library_name: sitdist
tags:
- camera-pose-estimation
- novel-view-synthesis
- flow-matching
---

# {name}

A flow between camera poses and pictures of one object: it renders the object from a pose, and reads the pose off a
picture. Made by sitdist {sitdist.__version__}.

```python
import sitdist

flow = sitdist.load("FOLDER_OR_HUB_ID")
pictures = flow.render(flow.turntable(24))        # [24, 3, {manifest.image_size}, {manifest.image_size}] in [0, 1]
estimate = flow.estimate(["picture.png"])         # estimate.camera_to_world: [1, 4, 4]
```

Poses are camera-to-world matrices with OpenGL axes (x right, y up, looking down -z) in a world whose +z is up.

| | |
|---|---|
| pictures | {manifest.image_size}x{manifest.image_size} pixels, {camera} |
| objects by label | {objects} |
| training views | {manifest.splits["train"].count} with cameras at {low:.2f} to {high:.2f} from the origin |
| latents | {latent.channels}x{latent.height}x{latent.width}, codec {manifest.codec["kind"]} |
| model | SiT, {parameters:,} parameters, averaged weights after {loaded.step:,} steps |
| flow | {loaded.config.flow.path} path, {loaded.config.flow.endpoint} endpoint, sigma {loaded.config.flow.sigma:g} |
| frame of the poses | {frames} |
| error bars | {bars} |

The model knows this object alone, on this background, from such distances. Poses from farther or nearer are worse.

## Measured results

{results}
"""
