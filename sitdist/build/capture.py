"""What a user has of an object: posed pictures, pictures without poses, or a video.

Poses come from a transforms.json or a COLMAP model, or are found by COLMAP's own incremental reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from sitdist.errors import DataError, shortened
from sitdist.io.arrays import read_posed_array
from sitdist.io.images import SUFFIXES, focal_length, open_picture, picture_sizes
from sitdist.io.transforms import PosedFile
from sitdist.scene.photos import posed_files

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
FEWEST = 3  # pictures that a reconstruction needs
RECONSTRUCTED_MODEL = "SIMPLE_RADIAL"  # the camera that a reconstruction finds
EXTRA = "pip install 'sitdist[photos]'"


@dataclass
class Capture:
    """Posed pictures, in order of their names, and the names of those that are left out and why."""

    posed: list[PosedFile]
    without_file: list[str] = field(default_factory=list)
    without_pose: list[str] = field(default_factory=list)


def read_capture(source: Path, work: Path, images: Path | None = None, frames: int = 100) -> Capture:
    """The posed pictures at `source`; DataError, PoseError for what is missing or cannot be used.

    A transforms.json or its folder, an .npz file of posed pictures, a COLMAP workspace (`images` as for `read_photos`),
    a folder of pictures, or a video, of which `frames` sharp ones are taken. `work`: a folder for files that are needed
    as long as the capture.
    """
    capture = Capture([])
    if source.suffix.lower() == ".npz":
        return Capture(_saved(source, work / "pictures"))
    if source.suffix.lower() in VIDEO_SUFFIXES:
        save_sharp_frames(source, frames, work / "frames")
        return reconstruct(work / "frames", work)
    files, capture.posed = posed_files(source, images, capture.without_file)
    if not files:
        return reconstruct(source, work)
    if not capture.posed:
        raise DataError(
            f"{files[0]}: none of its {len(capture.without_file)} pictures has a file, such as "
            f"{capture.without_file[0][:200]}; restore them"
        )
    return capture


def _saved(file: Path, folder: Path) -> list[PosedFile]:
    """The pictures of an .npz file as PNG files."""
    array = read_posed_array(file)
    folder.mkdir(parents=True)
    posed = []
    for number, image in enumerate(array.images):
        pixels = image if image.dtype == np.uint8 else (255.0 * image.clip(0.0, 1.0)).round().astype(np.uint8)
        path = folder / f"{number:05d}.png"
        Image.fromarray(pixels).save(path)
        posed.append(PosedFile(path, array.camera_to_world[number], array.intrinsics))
    return posed


def save_sharp_frames(video: Path, count: int, folder: Path) -> None:
    """Cut a video into `count` equal stretches and save the sharpest frame of each, upright, as a PNG."""
    try:
        import av
    except ImportError:
        raise DataError(f"{video}: a video, which needs PyAV; {EXTRA}, or give a folder of its frames") from None
    folder.mkdir(parents=True)
    try:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            seconds = float((container.duration or 0) / av.time_base)
            if seconds <= 0:
                raise DataError(f"{video}: does not tell how long it is; give a folder of its frames")
            stretches = groupby(
                container.decode(stream), lambda frame: min(int((frame.time or 0.0) / seconds * count), count - 1)
            )
            for stretch, frames in stretches:
                pictures = (np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in frames)
                sharpest = np.ascontiguousarray(max(pictures, key=_sharpness))
                Image.fromarray(sharpest).save(folder / f"{stretch:05d}.png")
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{video}: not a readable video ({error}); give another, or a folder of its frames") from None


def _sharpness(pixels: np.ndarray) -> float:
    """Mean square of the Laplacian of the green channel of [H, W, 3] uint8."""
    green = pixels[..., 1].astype(np.float32)
    laplacian = 4.0 * green[1:-1, 1:-1] - green[:-2, 1:-1] - green[2:, 1:-1] - green[1:-1, :-2] - green[1:-1, 2:]
    return float(np.square(laplacian).mean())


def reconstruct(folder: Path, work: Path) -> Capture:
    """Find the poses and the camera of the pictures in a folder, by COLMAP; those that it cannot place are left out."""
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not pictures:
        raise DataError(
            f"{folder}: neither a transforms.json, a COLMAP model, a folder of pictures nor a video "
            f"({', '.join(VIDEO_SUFFIXES)}); give one of them"
        )
    if len(pictures) < FEWEST:
        raise DataError(f"{folder}: {len(pictures)} pictures without poses; at least {FEWEST} are needed; add pictures")
    try:
        import pycolmap
    except ImportError:
        raise DataError(
            f"{folder}: photos without poses, which need pycolmap to find them; {EXTRA}, or put a transforms.json or "
            "a COLMAP model beside the photos"
        ) from None
    upright, names = work / "upright", {}
    upright.mkdir(parents=True)
    for number, picture in enumerate(pictures):  # COLMAP ignores the orientation
        names[f"{number:05d}.png"] = picture
        open_picture(picture).convert("RGB").save(upright / f"{number:05d}.png")
    sizes, focals = {picture_sizes(each)[0] for each in pictures}, {focal_length(each) for each in pictures}
    mode = pycolmap.CameraMode.SINGLE if len(sizes) == 1 and len(focals) == 1 else pycolmap.CameraMode.PER_IMAGE
    reader = pycolmap.ImageReaderOptions(camera_model=RECONSTRUCTED_MODEL)
    focal, (width, height) = next(iter(focals)), next(iter(sizes))
    if mode == pycolmap.CameraMode.SINGLE and focal is not None:
        reader.camera_params = f"{focal},{0.5 * width},{0.5 * height},0"
    database, models = work / "database.db", work / "models"
    models.mkdir()
    pycolmap.logging.minloglevel = 3  # failures are told below
    pycolmap.set_random_seed(0)
    try:
        pycolmap.extract_features(database, upright, camera_mode=mode, reader_options=reader)
        pycolmap.match_exhaustive(database)
        found = pycolmap.incremental_mapping(database, upright, models)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{folder}: COLMAP fails ({shortened(' '.join(str(error).split()))}); give poses") from None
    if not found:
        raise DataError(
            f"{folder}: COLMAP finds no poses of these {len(pictures)} photos; take more, sharper ones, with more "
            "overlap and texture, or give poses"
        )
    model = work / "model"
    model.mkdir()
    max(found.values(), key=lambda each: each.num_reg_images()).write_text(model)
    _, posed = posed_files(model, upright)
    back = [replace(each, picture=names[each.picture.name]) for each in posed]
    placed = {each.picture for each in back}
    return Capture(back, without_pose=[str(each) for each in pictures if each not in placed])
