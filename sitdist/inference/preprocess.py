"""Bring pictures of any size and kind to the training pictures' size, intrinsics and background, and back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from sitdist.config.load import parse
from sitdist.config.schema import Colour, Schema
from sitdist.dataset.manifest import DatasetManifest, load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.errors import ConfigError, DataError
from sitdist.geometry.camera import Intrinsics, check_intrinsics
from sitdist.geometry.packing import PoseStatistics
from sitdist.geometry.resample import kernel_weights
from sitdist.io.images import Picture, check_camera_size, picture_sizes, to_pixels
from sitdist.scene.views import backdrop, border_pixels, open_scene

HELD_OUT_PICTURES = 16  # whose borders tell the background where no recipe does


@dataclass(frozen=True)
class Preprocess:
    """What all training pictures have in common.

    camera: of the square training pictures, None where it is not known. backgrounds: colours in [0, 1] by label, of
    the labels whose colour is known.
    """

    size: int
    camera: Intrinsics | None
    backgrounds: dict[int, tuple[float, float, float]]

    def background(self, label: int) -> Tensor:
        """The colour [3] behind object `label`; DataError where it is not known."""
        if label not in self.backgrounds:
            raise DataError(
                f"label {label}: the colour behind the object is not known here, as neither the recipe nor the dataset "
                "tells it; give background=(r, g, b)"
            )
        return torch.tensor(self.backgrounds[label])

    def seen_by(self, normalized: Sequence[float]) -> Preprocess:
        """The same with the camera of these normalized intrinsics."""
        return replace(self, camera=square_camera(normalized, self.size))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives the same one back."""
        camera = None if self.camera is None else self.camera.normalized()
        colours = {str(label): list(colour) for label, colour in self.backgrounds.items()}
        return {"size": self.size, "camera": camera, "backgrounds": colours}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """What `to_dict` gave; ConfigError or DataError if it cannot be that of training pictures."""
        given = parse(_Preprocess, values, "framing")
        camera = None if given.camera is None else square_camera(given.camera, given.size)
        if camera is not None:
            check_intrinsics(camera, "framing.camera")
        return cls(given.size, camera, {int(label): colour for label, colour in given.backgrounds.items()})


class _Preprocess(Schema):
    size: Annotated[int, Field(gt=0, le=1 << 14)]
    camera: Annotated[tuple[float, float, float, float], Field(strict=False)] | None
    backgrounds: dict[Annotated[str, Field(pattern="^[0-9]{1,6}$")], Colour]


def square_camera(normalized: Sequence[float], size: int) -> Intrinsics:
    """The camera of a square picture by its normalized intrinsics."""
    fx, fy, cx, cy = (float(value) * size for value in normalized)
    return Intrinsics(fx, fy, cx, cy, size, size)


def preprocess_of(manifest: DatasetManifest, data: Path) -> Preprocess:
    """As the manifest tells it; what it does not tell is read from the dataset in `data`, where that is at hand.

    DataError where its recipe tells no camera or colour that pictures can have.
    """
    dataset = data if _is_there(manifest, data) else None
    try:
        colours = {entry.label: _background(manifest, entry.label, dataset) for entry in manifest.objects}
        known = {label: (float(c[0]), float(c[1]), float(c[2])) for label, c in colours.items() if c is not None}
        preprocess = Preprocess(manifest.image_size, _camera(manifest, dataset), known)
        Preprocess.from_dict(preprocess.to_dict())
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, ConfigError) as error:
        raise DataError(
            f"dataset {manifest.name}: its recipe does not tell how its pictures are made ({str(error)[:160]}); "
            "build the dataset again"
        ) from None
    return preprocess


def _is_there(manifest: DatasetManifest, data: Path) -> bool:
    try:
        return load_manifest(data) == manifest
    except DataError:
        return False


def _camera(manifest: DatasetManifest, dataset: Path | None) -> Intrinsics | None:
    statistics = PoseStatistics.from_dict(manifest.statistics)
    if statistics.has_intrinsics:
        return square_camera(statistics.mean[3].tolist(), manifest.image_size)
    fields_of_view = {source.get("fov_deg") for source in manifest.train_sources()}
    fov_deg = fields_of_view.pop()
    if fov_deg is not None and not fields_of_view:
        return Intrinsics.from_fov(fov_deg, manifest.image_size, manifest.image_size)
    if dataset is None:
        return None
    return square_camera(ShardReader(dataset, "train").intrinsics([0])[0].tolist(), manifest.image_size)


def stated_background(source: dict[str, Any]) -> Sequence[float] | None:
    """The colour behind the object that a source of a recipe states."""
    return source.get("background") or (source.get("radius_augmentation") or {}).get("background")


def _background(manifest: DatasetManifest, label: int, dataset: Path | None) -> Sequence[float] | None:
    """The colour behind an object: as the recipe states it, of the scene, or measured; None where it is not known."""
    for source in manifest.train_sources():
        if source.get("label", 0) != label:
            continue
        colour = stated_background(source)
        if colour is None and source["kind"] == "scene":
            with suppress(DataError):  # the fitted scene is not at hand
                colour = backdrop(open_scene(source.get("scene"))).tolist()
        if colour is not None:
            return colour
    return None if dataset is None else _measured_background(dataset, label)


def _measured_background(dataset: Path, label: int) -> Sequence[float] | None:
    """The median colour of the borders of held-out pictures of the object; None where none are kept."""
    for split in sorted(set(load_manifest(dataset).splits) - {"train"}):
        reader = ShardReader(dataset, split)
        chosen = (reader.labels() == label).nonzero().flatten()[:HELD_OUT_PICTURES].tolist()
        if chosen:
            return border_pixels(reader.images(chosen)).quantile(0.5, dim=0).tolist()
    return None


def centred(preprocess: Preprocess, width: int, height: int) -> Intrinsics | None:
    """The camera of a picture whose largest centred square shows what a training picture shows; None if unknown."""
    if preprocess.camera is None:
        return None
    side = min(width, height)
    fx, fy, cx, cy = (value * side / preprocess.size for value in preprocess.camera.to_list())
    return Intrinsics(fx, fy, 0.5 * (width - side) + cx, 0.5 * (height - side) + cy, width, height)


def nearest_square(camera: Intrinsics, size: int) -> Intrinsics:
    """The camera of a picture of size x size pixels about the middle of what `camera` shows, just containing it."""
    side = max(camera.width, camera.height)
    left, top = 0.5 * (side - camera.width), 0.5 * (side - camera.height)
    fx, fy, cx, cy = (size / side * value for value in (camera.fx, camera.fy, camera.cx + left, camera.cy + top))
    return Intrinsics(fx, fy, cx, cy, size, size)


def framed(
    picture: Picture,
    preprocess: Preprocess,
    name: str,
    intrinsics: Intrinsics | Sequence[float] | None = None,
    mask: Any = None,
    background: Tensor | None = None,
) -> Tensor:
    """A picture as a training picture, [3, S, S] float32 in [0, 1].

    intrinsics: of the upright picture, or fx, fy, cx, cy of it; it is then resampled to the training camera. None: its
    largest centred square shows what a training picture shows. mask: [H, W], the object's share of every pixel.
    background [3]: behind transparent pixels and outside of the picture; None: neither may occur (DataError).
    """
    colour, alpha = to_pixels(picture, name)
    height, width = colour.shape[1:]
    if mask is not None:
        alpha = _mask(mask, (height, width), name) * (1.0 if alpha is None else alpha)
    if alpha is not None and bool((alpha < 1.0).any()):
        if background is None:
            raise DataError(f"{name}: transparent, and the colour behind the object is not known; give the background")
        colour = alpha * colour + (1.0 - alpha) * background[:, None, None]
    if intrinsics is None:
        side, size = min(width, height), preprocess.size
        whole = Intrinsics(size, size, 0.5 * size, 0.5 * size, size, size)
        return resampled(colour, Intrinsics(side, side, 0.5 * width, 0.5 * height, width, height), whole, None, name)
    if preprocess.camera is None:
        raise DataError(
            f"{name}: the training pictures' intrinsics are not known here, as the dataset is not at hand; load an "
            "export that was made beside the dataset, or crop the picture as they were and give no intrinsics"
        )
    shown = stored = (width, height)
    if isinstance(picture, str | Path | Image.Image):
        shown, stored = picture_sizes(Path(picture) if isinstance(picture, str) else picture, name)
    told = (intrinsics.width, intrinsics.height) if isinstance(intrinsics, Intrinsics) else None
    check_camera_size(shown, stored, told, name)
    camera = camera_of(intrinsics, shown, name)
    assert camera is not None
    return resampled(colour, camera, preprocess.camera, background, name)


def camera_of(given: Intrinsics | Sequence[float] | None, size: tuple[int, int], name: str) -> Intrinsics | None:
    """A camera as given, checked; fx, fy, cx, cy are for pictures of `size` (width, height). DataError."""
    if given is None:
        return None
    if not isinstance(given, Intrinsics):
        fx, fy, cx, cy = given
        given = Intrinsics(fx, fy, cx, cy, *size)
    check_intrinsics(given, name)
    return given


def _mask(mask: Any, size: tuple[int, int], name: str) -> Tensor:
    shares = to_pixels(mask, f"mask of {name}")[0][0]
    if tuple(shares.shape) != size:
        raise DataError(
            f"mask of {name}: {shares.shape[1]}x{shares.shape[0]} pixels but the picture has {size[1]}x{size[0]}; give "
            "one share for every pixel"
        )
    return shares


def resampled(picture: Tensor, source: Intrinsics, target: Intrinsics, background: Tensor | None, name: str) -> Tensor:
    """A picture [3, H, W] of the camera `source` as `target` sees it from the same place, [3, height, width].

    What `source` did not see has the colour `background` [3]; DataError if that is None and there is such a part.
    """
    if source == target:
        return picture
    columns = _line(target.width, target.cx, target.fx, source.width, source.cx, source.fx)
    rows = _line(target.height, target.cy, target.fy, source.height, source.cy, source.fy)
    outside = max(float(1.0 - weights.sum(1).min()) for weights in (columns, rows))
    if background is None and outside > 1e-9:
        raise DataError(
            f"{name}: shows less than a training picture, and the colour behind the object is not known; give the "
            "background"
        )
    colour = torch.zeros(3, 1, 1).double() if background is None else background.double()[:, None, None]
    out = colour + rows @ (picture.double() - colour) @ columns.T
    return out.clamp(0.0, 1.0).float()


def _line(to_size: int, to_centre: float, to_focal: float, size: int, centre: float, focal: float) -> Tensor:
    """Weights [to_size, size] of a line's pixels; a row whose place is in the line adds up to 1, others to less."""
    step = focal / to_focal
    place = centre + (torch.arange(to_size, dtype=torch.float64) + 0.5 - to_centre) * step
    weights = kernel_weights(place, max(1.0, step), size)
    inside = (place >= 0.0) & (place <= size)
    return torch.where(inside[:, None], weights / weights.sum(1, keepdim=True), weights)
