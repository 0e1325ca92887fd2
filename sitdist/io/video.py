"""Rendered pictures as files: PNGs with their transforms.json, a GIF, or an MP4."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sitdist.errors import ConfigError, DataError
from sitdist.geometry.camera import Intrinsics
from sitdist.io.atomic import check_free, write_atomically, write_folder
from sitdist.io.files import write_json
from sitdist.io.transforms import transforms

ANIMATIONS = (".gif", ".mp4")


def check_out(out: Path, overwrite: bool = False) -> None:
    """DataError, ConfigError unless pictures can be written to `out`: a new folder, or a .gif or .mp4 file."""
    check_free(out, overwrite and out.suffix.lower() in ANIMATIONS)
    if out.suffix and out.suffix.lower() not in ANIMATIONS:
        raise ConfigError(f"{out}: pictures go to a folder, or to a file that ends in {' or '.join(ANIMATIONS)}")
    if out.suffix.lower() == ".mp4" and ffmpeg() is None:
        raise ConfigError(
            f"{out}: an MP4 needs ffmpeg, which is not installed; pip install imageio-ffmpeg, or name a .gif"
        )


def ffmpeg() -> str | None:
    """The program that writes MP4s: imageio-ffmpeg's, or else the system's; None if there is none."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return shutil.which("ffmpeg")


def write_rendered(
    pictures: Tensor,
    camera_to_world: Tensor,
    intrinsics: Intrinsics | Sequence[Intrinsics] | None,
    out: Path,
    frames_per_second: float,
) -> None:
    """Write pictures [N, 3, H, W] in [0, 1] to `out`, as `check_out` says; whole or not at all.

    A folder also gets a transforms.json with the poses [N, 4, 4], where the intrinsics are known.
    """
    frames = to_images(pictures)
    if out.suffix.lower() == ".gif":
        write_atomically(out, lambda path: save_gif(frames, path, frames_per_second))
    elif out.suffix.lower() == ".mp4":
        write_atomically(out, lambda path: save_mp4(frames, path, frames_per_second, out))
    else:

        def write(folder: Path) -> None:
            folder.mkdir(parents=True)
            for number, frame in enumerate(frames):
                frame.save(folder / f"{number:05d}.png")
            if intrinsics is not None:
                cameras = [intrinsics] * len(frames) if isinstance(intrinsics, Intrinsics) else list(intrinsics)
                write_json(folder / "transforms.json", transforms(camera_to_world, cameras))

        write_folder(out, write)


def to_images(pictures: Tensor) -> list[Image.Image]:
    """8-bit pictures of [N, 3, H, W] in [0, 1]."""
    arrays = (pictures.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def save_gif(frames: Sequence[Image.Image], path: Path, frames_per_second: float) -> None:
    """A loop of all pictures; a GIF counts in hundredths of a second."""
    milliseconds = max(20, 10 * round(100.0 / frames_per_second))
    frames[0].save(
        path, format="GIF", save_all=True, append_images=list(frames[1:]), duration=milliseconds, loop=0, disposal=2
    )


def save_mp4(frames: Sequence[Image.Image], path: Path, frames_per_second: float, out: Path) -> None:
    """H.264 in 4:2:0, which every browser plays; enlarged to even sizes of at least 256 pixels, pixels kept square."""
    width, height = frames[0].size
    factor = max(2, -(-256 // min(width, height)))
    factor += factor % 2  # both sides become even
    command: list[Any] = [ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", str(frames_per_second), "-i", "-"]
    command += ["-vf", f"scale={factor * width}:{factor * height}:flags=lanczos"]
    command += ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-f", "mp4", str(path.absolute())]
    data = b"".join(frame.tobytes() for frame in frames)
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"{out}: ffmpeg could not write it ({reason[:160]}); name a .gif instead")
