"""A fitted scene on disk: field.safetensors and scene.json in one folder, written whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sitdist import __version__
from sitdist.errors import DataError
from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.similarity import Similarity
from sitdist.scene.grid import VoxelField
from sitdist.scene.volume import Rendered, march_occupied, picture

SCENE_VERSION = 1
FIELD_FILE, SCENE_FILE, TURNTABLE_FILE = "field.safetensors", "scene.json", "turntable.png"

Frame = Literal["unit", "capture"]


@dataclasses.dataclass
class Scene:
    """A field in the unit frame, and the similarity that takes the capture's own frame there.

    `frame` says in which of the two the scene's poses are given. `held_out` holds the mean of every measure over
    `held_out["views"]` photos that were not fitted; `source` says what was fitted, and how.
    """

    field: VoxelField
    similarity: Similarity
    frame: Frame = "unit"
    held_out: dict[str, float] = dataclasses.field(default_factory=dict)
    source: dict[str, Any] = dataclasses.field(default_factory=dict)

    def render(self, camera_to_world: Tensor, intrinsics: Intrinsics, supersample: int = 1) -> Tensor:
        """Pictures [N, 3, H, W] in [0, 1] from cameras [N, 4, 4], which are in the scene's frame."""
        pictures = [self.look(pose, intrinsics, supersample).on(self.field.background) for pose in camera_to_world]
        return torch.stack(pictures).permute(0, 3, 1, 2)

    def look(self, camera_to_world: Tensor, intrinsics: Intrinsics, supersample: int = 1) -> Rendered:
        """What one camera [4, 4] sees of it before no background yet, [H, W, 3] and [H, W]."""
        pose = self.similarity.cameras(camera_to_world) if self.frame == "capture" else camera_to_world
        return look_at_field(self.field, pose, intrinsics, supersample)


@torch.no_grad()
def look_at_field(field: VoxelField, camera_to_world: Tensor, intrinsics: Intrinsics, supersample: int = 1) -> Rendered:
    """What a camera [4, 4] in the field's frame sees, [H, W, 3], [H, W]; a pixel is the mean of supersample^2 rays."""
    pose = camera_to_world.to(field.box.device)
    return picture(partial(march_occupied, field, step=field.voxel), pose, intrinsics, supersample)


def render_field(field: VoxelField, camera_to_world: Tensor, intrinsics: Intrinsics, supersample: int = 1) -> Tensor:
    """The same before the field's own background, [3, H, W]."""
    return look_at_field(field, camera_to_world, intrinsics, supersample).on(field.background).permute(2, 0, 1)


@dataclasses.dataclass
class _SceneFile:
    """scene.json: these keys, all of them, and no others."""

    format_version: int
    frame: Frame
    similarity: dict[str, Any]
    box: list[list[float]]
    background: list[float]
    resolution: list[int]
    channels: int
    density_scale: float
    field_sha256: str
    held_out: dict[str, float]
    source: dict[str, Any]
    versions: dict[str, str]


def check_free(folder: Path) -> None:
    """DataError if there is something at `folder` already."""
    if folder.exists():
        raise DataError(f"{folder}: already exists; give another --out, or remove it")


def save_scene(scene: Scene, folder: Path, turntable: Tensor | None = None) -> None:
    """Write the scene, and a picture [3, H, W], as a new folder; DataError if there is one."""
    check_free(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    assert scene.field.cells is not None
    data = save({"values": scene.field.values.cpu().contiguous(), "cells": scene.field.cells.cpu()})
    (temporary / FIELD_FILE).write_bytes(data)
    values = dataclasses.asdict(_describe(scene, hashlib.sha256(data).hexdigest()))
    (temporary / SCENE_FILE).write_text(json.dumps(values, indent=2) + "\n")
    if turntable is not None:
        write_png(turntable, temporary / TURNTABLE_FILE)
    temporary.rename(folder)


def _describe(scene: Scene, field_sha256: str) -> _SceneFile:
    return _SceneFile(
        format_version=SCENE_VERSION,
        frame=scene.frame,
        similarity=scene.similarity.to_dict(),
        box=scene.field.box.tolist(),
        background=scene.field.background.tolist(),
        resolution=list(scene.field.resolution),
        channels=len(scene.field.values),
        density_scale=scene.field.density_scale,
        field_sha256=field_sha256,
        held_out=scene.held_out,
        source=scene.source,
        versions={"sitdist": __version__, "torch": torch.__version__},
    )


def load_scene(folder: Path, device: torch.device | str = "cpu") -> Scene:
    """What `save_scene` wrote; DataError if it is missing, damaged, or of a newer version."""
    path = folder / SCENE_FILE
    values = _read_scene_file(path)
    data = _read_field_file(folder / FIELD_FILE, values.field_sha256)
    try:
        box, background = torch.tensor(values.box).reshape(2, 3), torch.tensor(values.background).reshape(3)
        field = VoxelField(data["values"], box, background, float(values.density_scale), data["cells"])
        similarity = Similarity.from_dict(values.similarity)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{path}: not a scene's description ({error!r}); fit the scene again") from None
    return Scene(field.to(device).frozen(), similarity, values.frame, values.held_out, values.source)


def _read_scene_file(path: Path) -> _SceneFile:
    if not path.is_file():
        raise DataError(f"{path}: no such file; make a scene with `sitdist scene fit`")
    try:
        values = json.loads(path.read_text())
        version = values["format_version"]
        if version != SCENE_VERSION:
            raise DataError(
                f"{path}: format_version {version} but this sitdist reads {SCENE_VERSION}; update it, or fit again"
            )
        description = _SceneFile(**values)
    except (ValueError, KeyError, TypeError) as error:  # a TypeError names the key that is missing or not known
        raise DataError(f"{path}: not a scene's description ({error}); fit the scene again") from None
    if description.frame not in get_args(Frame):
        raise DataError(f"{path}: frame '{description.frame}' is none of {get_args(Frame)}; fit the scene again")
    return description


def _read_field_file(path: Path, sha256: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"{path}: no such file, though {SCENE_FILE} is there; fit the scene again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{path}: its bytes are not those that {SCENE_FILE} was written with; fit the scene again")
    try:
        return load(data)
    except SafetensorError as error:
        raise DataError(f"{path}: not readable ({error}); fit the scene again") from None


def write_png(picture: Tensor, path: Path) -> None:
    """A picture [3, H, W] in [0, 1] as an 8-bit PNG."""
    from PIL import Image

    Image.fromarray((picture.clamp(0.0, 1.0) * 255.0).round().byte().permute(1, 2, 0).cpu().numpy()).save(path)
