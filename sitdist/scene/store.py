"""A fitted scene on disk: a folder with field.safetensors and scene.json, written whole or not at all."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from sitdist import __version__
from sitdist.errors import DataError
from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.similarity import Similarity
from sitdist.io.arrays import read_tensors
from sitdist.io.atomic import file_sha256, write_folder
from sitdist.io.files import read_json, write_json
from sitdist.scene.grid import VoxelField
from sitdist.scene.volume import Rendered, march_occupied, picture

SCENE_VERSION = 1
REMEDY = "fit the scene again"
CHANNELS = (4, 13)  # density and colour; and slopes of the colour
LARGEST = 1e9  # coordinate of the box, and density per unit of length: float32 holds their products
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
        """Render one camera [4, 4] without compositing a background, [H, W, 3] and [H, W]."""
        if self.frame == "unit":
            return look_at_field(self.field, camera_to_world, intrinsics, supersample)
        seen = look_at_field(self.field, self.similarity.cameras(camera_to_world), intrinsics, supersample)
        return seen._replace(depth=seen.depth / self.similarity.scale)  # in the capture's units


@torch.no_grad()
def look_at_field(field: VoxelField, camera_to_world: Tensor, intrinsics: Intrinsics, supersample: int = 1) -> Rendered:
    """Render a camera [4, 4] in the field's frame, [H, W, 3], [H, W]; each pixel averages supersample^2 rays."""
    pose = camera_to_world.to(field.box.device)
    return picture(partial(march_occupied, field, step=field.voxel), pose, intrinsics, supersample)


def render_field(field: VoxelField, camera_to_world: Tensor, intrinsics: Intrinsics, supersample: int = 1) -> Tensor:
    """The same on the field's own background, [3, H, W]."""
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


def save_scene(scene: Scene, folder: Path, turntable: Tensor | None = None) -> None:
    """Write the scene, and a picture [3, H, W], as a new folder; DataError if there is one."""

    def write(temporary: Path) -> None:
        temporary.mkdir()
        assert scene.field.cells is not None
        tensors = {"values": scene.field.values.cpu().contiguous(), "cells": scene.field.cells.cpu()}
        save_file(tensors, temporary / FIELD_FILE)
        description = _describe(scene, file_sha256(temporary / FIELD_FILE))
        write_json(temporary / SCENE_FILE, dataclasses.asdict(description))
        if turntable is not None:
            write_png(turntable, temporary / TURNTABLE_FILE)

    write_folder(folder, write)


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
    data = read_tensors(folder / FIELD_FILE, values.field_sha256, REMEDY, dtypes=(torch.float32, torch.bool))
    try:
        field = _field_of(values, data)
        similarity = Similarity.from_dict(values.similarity)
        if not all(isinstance(each, int | float) for each in values.held_out.values()):
            raise ValueError("held_out must be numbers")
    except (ValueError, KeyError, TypeError, RuntimeError, ArithmeticError, AttributeError) as error:
        raise DataError(f"{path}: not a scene's description ({str(error)[:160]}); {REMEDY}") from None
    return Scene(field.to(device).frozen(), similarity, values.frame, values.held_out, values.source)


def _field_of(values: _SceneFile, data: dict[str, Tensor]) -> VoxelField:
    box, background = (torch.tensor(each, dtype=torch.float32) for each in (values.box, values.background))
    nx, ny, nz = values.resolution
    shapes = {"values": (values.channels, nz, ny, nx), "cells": (nz - 1, ny - 1, nx - 1)}
    found = {name: tuple(tensor.shape) for name, tensor in data.items()}
    if found != shapes or min(values.resolution) < 2 or values.channels not in CHANNELS:
        raise ValueError(f"{FIELD_FILE} holds {found}; expected {shapes}, at least 2 a side, of 4 or 13 channels")
    if data["values"].dtype != torch.float32 or data["cells"].dtype != torch.bool:
        raise ValueError(f"values must be float32 and cells bool in {FIELD_FILE}")
    if box.shape != (2, 3) or not (box[1] > box[0]).all() or not (box.abs() < LARGEST).all():
        raise ValueError(f"box {values.box} is no lower and upper corner")
    if background.shape != (3,) or not ((background >= 0) & (background <= 1)).all():
        raise ValueError(f"background {values.background} is no colour from 0 to 1")
    if not 0.0 < values.density_scale < LARGEST:
        raise ValueError(f"density_scale {values.density_scale} is not above 0 and below {LARGEST:g}")
    return VoxelField(data["values"], box, background, float(values.density_scale), data["cells"])


def _read_scene_file(path: Path) -> _SceneFile:
    remedy = "make a scene with `sitdist scene fit`"
    if not path.exists():
        raise DataError(f"{path}: no such file; {remedy}")
    values = read_json(path, remedy)
    version = values.get("format_version")
    if version != SCENE_VERSION:
        raise DataError(
            f"{path}: format_version {version!r:.80} but this sitdist reads {SCENE_VERSION}; update it, or fit again"
        )
    try:
        description = _SceneFile(**values)
    except TypeError as error:  # it names the key that is missing or not known
        raise DataError(f"{path}: not a scene's description ({str(error)[:160]}); {REMEDY}") from None
    if not isinstance(description.field_sha256, str):
        raise DataError(f"{path}: field_sha256 is no text; {REMEDY}")
    if description.frame not in get_args(Frame):
        raise DataError(f"{path}: frame {description.frame!r:.80} is none of {get_args(Frame)}; {REMEDY}")
    return description


def write_png(picture: Tensor, path: Path) -> None:
    """A picture [3, H, W] in [0, 1] as an 8-bit PNG."""
    from PIL import Image

    Image.fromarray((picture.clamp(0.0, 1.0) * 255.0).round().byte().permute(1, 2, 0).cpu().numpy()).save(path)
