"""A run as a folder that holds what inference needs and nothing else, as it is uploaded to a hub.

config.json          what the model is, what its training pictures have in common, the SHA-256 of its weights
model.safetensors    averaged weights (EMA)
manifest.json        the dataset's: pose statistics, objects and their frames, the codec's identity; no shards
codec/               pixels <-> latents
README.md            a model card with the run's measured results
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import sitdist
from sitdist.config import Config, parse
from sitdist.data.format import DatasetManifest, read_manifest
from sitdist.data.framing import Framing, framing_of
from sitdist.errors import CheckpointError, DataError
from sitdist.flow.predict import VelocityModel
from sitdist.io.atomic import file_sha256, write_folder
from sitdist.train.checkpoint import LoadedRun, assemble, load_run

FORMAT = "sitdist model"
FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
CALIBRATION = "calibration.json"  # a run has it once its error bars were fitted


def export_run(run: Path, out: Path, step: int | None = None) -> LoadedRun:
    """Write the run's newest checkpoint, or that of `step`, to the new folder `out`; it is there whole or not at all.

    DataError if `out` exists or cannot be written; whatever `load_run` raises.
    """
    if out.exists():
        raise DataError(f"{out}: already exists; give another folder, or remove it")
    loaded = load_run(run, "cpu", step)
    framing = framing_of(loaded.manifest, Path(loaded.config.data))
    manifest = without_shards(loaded.manifest)

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        save_file(_weights(loaded), folder / WEIGHTS)
        shutil.copytree(run / "codec", folder / "codec")
        if (run / CALIBRATION).is_file():
            values = json.loads((run / CALIBRATION).read_text())
            text = json.dumps(values | {"dataset": manifest.name}, indent=1) + "\n"
            (folder / CALIBRATION).write_text(text)
        (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1) + "\n")
        described = _description(loaded, framing, file_sha256(folder / WEIGHTS))
        (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
        (folder / "README.md").write_text(model_card(loaded, framing, _evaluations(run), _calibration(run)))

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


def _description(loaded: LoadedRun, framing: Framing, weights_sha256: str) -> dict[str, Any]:
    config = loaded.config.model_dump(mode="json")
    config["data"] = loaded.manifest.name
    config["evaluate"]["refine"] = None
    if config["model"].get("init_from"):
        config["model"]["init_from"] = Path(config["model"]["init_from"]).name
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {"sitdist": sitdist.__version__, "torch": torch.__version__},
        "step": loaded.step,
        "weights_sha256": weights_sha256,
        "framing": framing.to_dict(),
        "config": config,
    }


# ------------------------------------------------------------------------------------------------------------- reading


def is_exported(folder: Path) -> bool:
    """Whether a folder is an export rather than a run."""
    return (folder / "config.json").is_file() and not (folder / "config.yaml").is_file()


def load_exported(folder: Path, device: torch.device | str = "cpu") -> tuple[LoadedRun, Framing]:
    """What `export_run` wrote; CheckpointError, CodecError for what is damaged or missing."""
    path, weights = folder / "config.json", folder / WEIGHTS
    try:
        values = json.loads(path.read_text())
        if values.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {values.get('format')!r}, which is no sitdist model; export one")
        if values["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format_version {values['format_version']} but this sitdist reads {FORMAT_VERSION}; export "
                "the run again, or use the version of sitdist that wrote it"
            )
        framing, step, sha256 = Framing.from_dict(values["framing"]), int(values["step"]), values["weights_sha256"]
        config = values["config"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged ({' '.join(str(error).split())[:120]}); export the run again") from None
    for needed in (weights, folder / "manifest.json"):
        if not needed.is_file():
            raise CheckpointError(f"{needed}: missing; export the run again")
    if file_sha256(weights) != sha256:
        raise CheckpointError(f"{weights}: not the weights that config.json names; export the run again")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise CheckpointError(f"{weights}: damaged ({error}); export the run again") from None
    manifest = read_manifest(folder / "manifest.json")
    parsed = parse(Config, config, str(path))
    return assemble(parsed, manifest, tensors, weights, folder / "codec", step, device), framing


# ---------------------------------------------------------------------------------------------------------- model card


def _evaluations(run: Path) -> Iterator[dict[str, Any]]:
    """The results of the run's evaluations, as they lie on disk."""
    for path in sorted((run / "eval").glob("*/metrics.json")):
        try:
            values = json.loads(path.read_text())
        except ValueError:
            continue
        if isinstance(values, dict) and values.get("rows"):
            yield values


def _calibration(run: Path) -> dict[str, Any] | None:
    """What the run's error bars were fitted on; None where there are none."""
    path = run / CALIBRATION
    return json.loads(path.read_text()) if path.is_file() else None


def model_card(
    loaded: LoadedRun, framing: Framing, evaluations: Iterator[dict[str, Any]], calibration: dict[str, Any] | None
) -> str:
    """README.md of an export, with the metadata that the hub reads."""
    name, manifest = loaded.config.name, loaded.manifest
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    low, high = manifest.splits["train"].radius
    latent = manifest.latent
    camera = (
        "not known"
        if framing.camera is None
        else "fx {:.2f}, fy {:.2f}, cx {:.2f}, cy {:.2f} pixels".format(*framing.camera.to_list())
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
        else f"50% and 90%, and trust, fitted on {calibration['views']} views of `{calibration['split']}` for the "
        f"estimator `{calibration['estimator']['estimator']}`, read out by `{calibration['estimator']['readout']}`"
    )
    tables = [_table(values, loaded.step) for values in evaluations]
    results = "\n\n".join(tables) or "None measured yet: `sitdist eval RUN` before the export puts them here."
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


def _table(values: dict[str, Any], step: int) -> str:
    """One evaluation as a Markdown table."""
    columns = (
        ("rotation error, mean / median (deg)", lambda row: _pair(row.get("rotation_error_deg"), 2)),
        ("translation error", lambda row: _mean(row.get("translation_error"), 3)),
        ("PSNR (dB)", lambda row: _mean(row.get("psnr"), 2)),
        ("SSIM", lambda row: _mean(row.get("ssim"), 3)),
    )
    head = "| views | n | " + " | ".join(name for name, _ in columns) + " |"
    rule = "|---" * (2 + len(columns)) + "|"
    rows = [
        f"| {row['name']} | {row['n']} | " + " | ".join(cell(row) for _, cell in columns) + " |"
        for row in values["rows"]
    ]
    of = "" if values.get("step") == step else f" (of the weights after {values.get('step')} steps)"
    refined = ", poses refined by a scene" if values.get("refine") else ""
    title = f"Split `{values.get('split')}`{of}, estimator `{values.get('estimator')}`{refined}:"
    return "\n".join([title, "", head, rule, *rows])


def _mean(measure: dict[str, float] | None, digits: int) -> str:
    return "" if measure is None else f"{measure['mean']:.{digits}f}"


def _pair(measure: dict[str, float] | None, digits: int) -> str:
    return "" if measure is None else f"{measure['mean']:.{digits}f} / {measure['median']:.{digits}f}"
