"""Turn a capture into what the rest reads: square pinhole pictures of one camera, their poses, and a recipe.

All pictures have the same field of view and their principal point in the middle, as rendered views have.
"""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from sitdist.build.capture import Capture, read_capture
from sitdist.build.matte import Matting
from sitdist.build.sources import plain_background
from sitdist.config.load import dump_yaml, parse
from sitdist.config.recipe import Recipe
from sitdist.errors import ConfigError, DataError
from sitdist.geometry.camera import Intrinsics, camera_radius, look_at
from sitdist.geometry.similarity import capture_frame, turn_up
from sitdist.io.atomic import check_free, write_folder
from sitdist.io.files import write_json
from sitdist.io.transforms import PosedFile, transforms

PATCH = 4  # of the recipe's codec
MARGIN = 1.1  # of the field of view about the object
TAIL = 0.002  # share of an object's opacity to each side that the field of view ignores: specks of a mask
BLOCK = 2**19  # samples of a photo at a time
SUPERSAMPLE = 64  # most samples of a photo along the side of a pixel
FOV_DEG = (1.0, 170.0)  # what a recipe takes
FEWEST = 3  # photos to fit
GREY = (0.5, 0.5, 0.5)
VIEWS, TEST_VIEWS = 30000, 256  # of the recipe
GAP_DEG = 60.0  # of azimuth that no photo is taken from: the recipe leaves a wider one out


@dataclass(frozen=True)
class PhotoOptions:
    """How photos are prepared. `crop`: what all pictures have in their middle, the principal point or the object."""

    size: int = 64
    crop: Literal["principal", "object"] = "principal"
    matting: Matting = field(default_factory=Matting)
    images: Path | None = None
    frames: int = 100
    hold_out: int = 10
    strict: bool = False


@dataclass(frozen=True)
class Prepared:
    """Numbers of photos, their field of view, and whether a scene fit can tell the background from the object."""

    fitted: int
    held_out: int
    without_file: int
    without_pose: int
    fov_deg: float
    background_known: bool


@dataclass(frozen=True)
class _Look:
    """What is cut from a photo: the camera turned by `turn` [3, 3]; the sides of the object as (left, top, right,
    bottom) at distance 1 before that camera, x right, y down; None where the photo is opaque.
    """

    photo: PosedFile
    turn: Tensor
    object: Tensor | None

    def camera_to_world(self) -> Tensor:
        pose = self.photo.camera_to_world.clone()
        pose[:3, :3] = pose[:3, :3] @ self.turn
        return pose


def prepare_photos(source: Path, out: Path, options: PhotoOptions | None = None) -> Prepared:
    """Write the photos at `source`, as `read_capture` has it, to the new folder `out`.

    Pictures; transforms.json with all, test.json with those that are held out and train.json with the others; and
    recipe.yaml for views of a scene that is fitted to train.json. ConfigError, DataError, PoseError.
    """
    options = options or PhotoOptions()
    check_free(out)
    if options.size % (2 * PATCH):
        near = max(1, round(options.size / (2 * PATCH))) * 2 * PATCH
        raise ConfigError(f"--size {options.size}: no multiple of {2 * PATCH}, which latents need; give {near}")
    with tempfile.TemporaryDirectory(prefix="sitdist-photos-") as work:
        capture = read_capture(source, Path(work), options.images, options.frames)
        for names, what in ((capture.without_file, "without a file"), (capture.without_pose, "without a pose")):
            if names and options.strict:
                raise DataError(
                    f"{source}: {len(names)} photos {what}, such as {names[0][:200]}; restore or remove them, or leave "
                    "--strict out"
                )
        return _write(capture, out, options)


def _write(capture: Capture, out: Path, options: PhotoOptions) -> Prepared:
    looks = _looks(capture, options)
    camera = _camera(looks, options.size)
    poses = torch.stack([look.camera_to_world() for look in looks])
    masked = looks[0].object is not None
    held_out = [index for index in range(len(looks)) if options.hold_out and index % options.hold_out == 0]
    fitted = [index for index in range(len(looks)) if index not in held_out]
    if len(fitted) < FEWEST:
        raise DataError(
            f"{len(fitted)} photos to fit and {len(held_out)} held out: a scene needs {FEWEST} or, better, some dozens "
            "from all sides; add photos, or change --hold-out"
        )
    recipe = _recipe(out, poses, fitted, camera, masked)
    pictures: list[Tensor] = []

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        names = [f"{number:05d}.png" for number in range(len(looks))]
        for look, name in zip(tqdm(looks, "pictures", unit="picture"), names, strict=True):
            light, opacity = options.matting.read(look.photo.picture)
            picture = (resampled(light, opacity, look.photo, look.turn, camera) * 255.0).round().to(torch.uint8)
            to_pil_image(picture).save(folder / name)
            pictures.append(picture)
        values = transforms(poses, [camera] * len(looks), names)
        for frame, look in zip(values["frames"], looks, strict=True):
            frame["source"] = look.photo.picture.name
        for name, kept in (("transforms", range(len(looks))), ("train", fitted), ("test", held_out)):
            if kept:
                write_json(folder / f"{name}.json", {**values, "frames": [values["frames"][index] for index in kept]})
        (folder / "recipe.yaml").write_text(recipe)

    write_folder(out, write)
    known = masked or plain_background(torch.stack(pictures) / 255.0) is not None
    fov_deg = math.degrees(2.0 * math.atan(0.5 * camera.width / camera.fx))
    missing = len(capture.without_file), len(capture.without_pose)
    return Prepared(len(fitted), len(held_out), *missing, fov_deg, known)


def _looks(capture: Capture, options: PhotoOptions) -> list[_Look]:
    looks = []
    for photo in tqdm(capture.posed, "photos", unit="photo"):
        _, opacity = options.matting.read(photo.picture)
        looks.append(_Look(photo, torch.eye(3, dtype=torch.float64), _sides(opacity, photo)))
    masked = [look for look in looks if look.object is not None]
    if 0 < len(masked) < len(looks):
        bare = next(look for look in looks if look.object is None)
        raise DataError(
            f"{bare.photo.picture}: no alpha, but {len(masked)} of {len(looks)} photos have; give all of them "
            "alpha, or --masks, --key or --remove-background"
        )
    if options.crop == "principal":
        return looks
    if not masked:
        raise ConfigError(
            "--crop object: nothing says where the object is; give photos with alpha, --masks, --key or "
            "--remove-background"
        )
    return [_turned(look) for look in looks]


def _shown(photo: PosedFile, pixels: Tensor) -> Tensor:
    """Where a pinhole camera shows pixels [N, 2], at distance 1, of those that it can show."""
    camera = photo.intrinsics
    points = (pixels - pixels.new_tensor([camera.cx, camera.cy])) / pixels.new_tensor([camera.fx, camera.fy])
    points = points if photo.distortion is None else photo.distortion.undistort(points)
    return points[~points.isnan().any(dim=-1)]


def _outline(left: float, top: float, right: float, bottom: float) -> Tensor:
    """Points [N, 2] on the sides of a rectangle."""
    share = torch.linspace(0.0, 1.0, 65, dtype=torch.float64)
    x, y = left + share * (right - left), top + share * (bottom - top)
    sides = [(x, top + 0.0 * x), (x, bottom + 0.0 * x), (left + 0.0 * y, y), (right + 0.0 * y, y)]
    return torch.cat([torch.stack(side, dim=-1) for side in sides])


def _sides(opacity: Tensor | None, photo: PosedFile) -> Tensor | None:
    """The sides [4] of what is opaque; DataError where nothing is."""
    if opacity is None:
        return None
    total = float(opacity.double().sum())
    if total == 0.0:
        raise DataError(f"{photo.picture}: nothing in it is opaque; correct its mask, or leave it out")
    shares = [opacity.double().sum(dim).cumsum(0) / total for dim in (0, 1)]  # of columns, of rows
    low, high = ([float((share < edge).sum()) for share in shares] for edge in (TAIL, 1.0 - TAIL))
    points = _shown(photo, _outline(low[0], low[1], high[0] + 1.0, high[1] + 1.0))
    if len(points) == 0:
        raise DataError(f"{photo.picture}: its object is at the side of the camera or behind it; leave it out")
    return torch.cat([points.amin(dim=0), points.amax(dim=0)])


def _turned(look: _Look) -> _Look:
    """The same photo, its camera turned about its own centre until the object is in the middle of the picture."""
    assert look.object is not None
    left, top, right, bottom = look.object.tolist()
    target = torch.tensor([0.5 * (left + right), -0.5 * (top + bottom), -1.0], dtype=torch.float64)
    backward = -target / torch.linalg.vector_norm(target)
    turn = turn_up(backward).T  # takes +z, where the camera's back is, to `backward`
    corners = torch.tensor([[x, -y, -1.0] for x in (left, right) for y in (top, bottom)], dtype=torch.float64) @ turn
    x, y = -corners[:, 0] / corners[:, 2], corners[:, 1] / corners[:, 2]
    return _Look(look.photo, turn, torch.stack([x.min(), y.min(), x.max(), y.max()]))


def _camera(looks: list[_Look], size: int) -> Intrinsics:
    """The camera of all pictures: it sees the whole object or, where photos are opaque, what is inside all of them."""
    objects = [look.object for look in looks if look.object is not None]
    if objects:
        half = MARGIN * float(torch.stack(objects).abs().max())
    else:
        half = min(_inside(look.photo) for look in looks)
    if not FOV_DEG[0] < (fov := math.degrees(2.0 * math.atan(half))) < FOV_DEG[1]:
        raise DataError(
            f"the photos' common field of view is {fov:.3g} degrees; expected {FOV_DEG[0]:g} to {FOV_DEG[1]:g}: check "
            "focal lengths, principal points and masks"
        )
    return Intrinsics.from_fov(fov, size, size)


def _inside(photo: PosedFile) -> float:
    """Half the side, at distance 1, of the largest square about the principal point that a photo shows; or less."""
    camera = photo.intrinsics
    x, y = (min(camera.cx, camera.width - camera.cx), min(camera.cy, camera.height - camera.cy))
    if photo.distortion is None:
        return min(x / camera.fx, y / camera.fy)
    if min(x, y) <= 0.0:
        return 0.0
    border = _shown(photo, _outline(0.0, 0.0, camera.width, camera.height)).abs().amax(dim=-1)
    reach = photo.distortion.largest_radius / math.sqrt(2.0)
    return min(reach, float(border.min())) if len(border) else reach


def resampled(light: Tensor, opacity: Tensor | None, photo: PosedFile, turn: Tensor, camera: Intrinsics) -> Tensor:
    """What `camera`, turned by `turn` [3, 3], sees of a photo: [3, H, W], or [4, H, W] with opacity, in [0, 1].

    Light [3, h, w] is colour times opacity [h, w]. A pixel is the mean of enough bilinear samples to miss no pixel of
    the photo, up to SUPERSAMPLE^2. What the photo does not show is transparent.
    """
    own = photo.intrinsics
    factor = min(max(1, math.ceil(max(own.fx / camera.fx, own.fy / camera.fy))), SUPERSAMPLE)
    fine = camera.scaled(factor)
    source = light if opacity is None else torch.cat([light, opacity[None]])
    scale = torch.tensor([2.0 / own.width, 2.0 / own.height], dtype=torch.float64)
    column = (torch.arange(fine.width, dtype=torch.float64) + 0.5 - fine.cx) / fine.fx
    rows = []
    for row in torch.arange(fine.height, dtype=torch.float64).split(factor * max(1, BLOCK // (factor * fine.width))):
        y, x = torch.meshgrid(-(row + 0.5 - fine.cy) / fine.fy, column, indexing="ij")
        direction = torch.stack([x, y, -torch.ones_like(x)], dim=-1) @ turn.T
        depth = -direction[..., 2:].clamp_max(-1e-6)
        seen = torch.stack([direction[..., 0], -direction[..., 1]], dim=-1) / depth
        if photo.distortion is not None:  # what it does not reach is as far outside as what is behind
            seen = torch.where(photo.distortion.reaches(seen)[..., None], photo.distortion.distort(seen), 1e6)
        pixel = seen * seen.new_tensor([own.fx, own.fy]) + seen.new_tensor([own.cx, own.cy])
        samples = functional.grid_sample(
            source[None],
            (pixel * scale - 1.0).float()[None],
            padding_mode="border" if opacity is None else "zeros",
            align_corners=False,
        )
        rows.append(functional.avg_pool2d(samples, factor)[0])
    picture = torch.cat(rows, dim=1)
    if opacity is None:
        return picture.clamp(0.0, 1.0)
    colour = picture[:3] / picture[3:].clamp_min(1e-6)
    return torch.cat([colour, picture[3:]]).clamp(0.0, 1.0)


# -------------------------------------------------------------------------------------------------------------- recipe


def _recipe(out: Path, poses: Tensor, fitted: list[int], camera: Intrinsics, masked: bool) -> str:
    """The recipe for views of the scene from where the photos were taken, in the frame that `fit_scene` gives it."""
    frame = capture_frame(poses[fitted], [camera] * len(fitted))
    views: dict[str, Any] = {
        "kind": "scene",
        "scene": str(out / "scene"),
        **camera_ranges(frame.cameras(poses)),
        "fov_deg": round(math.degrees(2.0 * math.atan(0.5 * camera.width / camera.fx)), 4),
    }
    if masked:
        views["background"] = list(GREY)
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", out.name)[:100]
    recipe = {
        "name": name,
        "image_size": camera.width,
        "codec": {"kind": "pca", "channels": 4, "patch": PATCH, "fit_views": 2000},
        "keep_views": True,
        "splits": {
            "train": {**views, "views": VIEWS},
            "test": {**views, "views": TEST_VIEWS, "seed": 1},
        },
    }
    return (
        f"# Views of the object from where its photos were taken. Fit its scene first:\n"
        f"#   sitdist scene fit {out}/train.json --out {out}/scene\n"
        f"# Command: sitdist shards build {out}/recipe.yaml --out DATASET\n"
        f"{dump_yaml(parse(Recipe, recipe, 'recipe of the photos'), defaults=False)}"
    )


def camera_ranges(camera_to_world: Tensor) -> dict[str, Any]:
    """The keys of a scene's source whose ranges hold cameras [N, 4, 4] in the unit frame, a little widened."""
    position, backward = camera_to_world[:, :3, 3], camera_to_world[:, :3, 2]
    radius = camera_radius(camera_to_world)
    nearest, farthest = 0.95 * float(radius.min()), 1.05 * float(radius.max())
    elevation = (position[:, 2] / radius).clamp(-1.0, 1.0).asin().rad2deg()
    along = (position * backward).sum(-1, keepdim=True)
    beside = float(torch.linalg.vector_norm(position - along * backward, dim=-1).max())
    upright = look_at(position, position - backward)
    right = camera_to_world[:, :3, 0]
    roll = torch.atan2((right * upright[:, :3, 1]).sum(-1), (right * upright[:, :3, 0]).sum(-1)).rad2deg()
    told = backward[:, 2].abs() < math.cos(math.radians(5.0))  # straight up or down, no roll is defined
    rolled = float(roll[told].abs().max()) if told.any() else 0.0
    ranges: dict[str, Any] = {
        "radius": [round(nearest, 2), round(farthest, 2)],
        "elevation_deg": [
            round(max(-90.0, float(elevation.min()) - 2.0), 1),
            round(min(90.0, float(elevation.max()) + 2.0), 1),
        ],
    }
    azimuth = _azimuths(torch.atan2(position[:, 1], position[:, 0]).rad2deg())
    if azimuth is not None:
        ranges["azimuth_deg"] = azimuth
    if beside > 0.005:
        ranges["target_jitter"] = min(math.ceil(100.0 * beside) / 100.0, round(0.9 * nearest, 2))
    if rolled > 0.1:
        ranges["roll_deg"] = min(math.ceil(rolled), 180)
    return ranges


def _azimuths(azimuth_deg: Tensor) -> list[float] | None:
    """Smallest and largest of azimuths [N], widened, if they leave more than GAP_DEG out; else None."""
    azimuth = (azimuth_deg % 360.0).sort().values
    gaps = torch.cat([azimuth[1:], azimuth[:1] + 360.0]) - azimuth
    widest = int(gaps.argmax())
    if gaps[widest] <= GAP_DEG:
        return None
    start = float(azimuth[(widest + 1) % len(azimuth)])
    span = 360.0 - float(gaps[widest])
    start -= 360.0 if start + span > 350.0 else 0.0
    return [round(start - 5.0, 1), round(start + span + 5.0, 1)]
