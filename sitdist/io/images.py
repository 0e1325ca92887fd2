"""Picture files from anyone: the only place that opens them. Formats are listed, sizes bounded, orientation applied.

The format is decided by content, never by name. Width x height are checked before anything is decoded, and pixels are
as a viewer shows them: turned as the EXIF orientation tag says. Of several frames, the first is read.
"""

from __future__ import annotations

import ctypes
import io
import logging
import math
import warnings
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401
from torch import Tensor

from sitdist.errors import DataError
from sitdist.geometry.camera import MAX_PIXELS
from sitdist.io.arrays import check_unit_range
from sitdist.io.files import open_file

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")  # and HEIF where pillow-heif is installed
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".heic", ".heif")  # of pictures in a folder
MAX_BYTES = 2**30  # of a file
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1")
REMEDY = "replace it or leave it out"
TURNS = {  # EXIF 2.3, tag 0x0112: what makes a stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Size = tuple[int, int]  # width, height

Image.preinit()  # registers all but TIFF and WebP, whose modules do it when they are imported
# A damaged picture is one error, without lines of Pillow's and libtiff's own beside it.
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module=r"PIL\.")
with suppress(AttributeError, OSError):
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


def open_picture(source: Path | bytes | Image.Image, name: str = "") -> Image.Image:
    """A picture, decoded and upright, in the mode that it is stored in; DataError where it cannot be."""
    if isinstance(source, Image.Image):
        return _decode(source, name)
    with _opened(source) as file:
        return _decode(_read_header(file, name or str(source)), name or str(source))


def picture_sizes(source: Path | bytes | Image.Image, name: str = "") -> tuple[Size, Size]:
    """Width and height of a picture, upright and as stored, mostly by its header alone; DataError if it is none."""
    if isinstance(source, Image.Image):
        return _sizes(source, source.size, name)
    with _opened(source) as file:
        picture = _read_header(file, name or str(source))
        return _sizes(picture, _stored(picture), name or str(source))


def focal_length(path: Path) -> float | None:
    """The focal length in pixels that the EXIF data of a picture tells; None where it tells none.

    Source: EXIF 2.3, tags 0xA405 (of the same diagonal angle of view on 36 x 24 mm), 0x920A, 0xA20E and 0xA210.
    """
    with _opened(path) as file:
        picture = _read_header(file, str(path))
        width, height = _stored(picture)
        try:
            tags = picture.getexif().get_ifd(0x8769)
            equivalent, focal, density = (float(tags.get(tag, 0.0)) for tag in (0xA405, 0x920A, 0xA20E))
            unit = {2: 25.4, 3: 10.0, 4: 1.0}[int(tags.get(0xA210, 2))]
        except Exception:  # damaged tags tell nothing
            return None
    pixels = equivalent * math.hypot(width, height) / math.hypot(36.0, 24.0) or focal * density / unit
    return pixels if 0.1 * max(width, height) < pixels < 100.0 * max(width, height) else None


def to_array(picture: Image.Image, name: str) -> np.ndarray:
    """Pixels of a decoded picture, [H, W] or [H, W, C]: uint8, uint16 or float32; two and four channels hold opacity.

    Pillow reads 16-bit colour at 8 bits; 16-bit grey stays.
    """
    key = picture.info.get("transparency")
    if picture.mode.startswith("I"):  # 16 bits, in whatever width Pillow keeps them
        grey = np.asarray(picture)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(f"{name}: grey values from {grey.min()} to {grey.max()}; save it with 8 or 16 bits")
        grey = grey.astype(np.uint16)
        return grey if key is None else np.stack([grey, np.where(grey == key, 0, 65535).astype(np.uint16)], axis=-1)
    if picture.mode == "F":
        return np.asarray(picture)
    if isinstance(key, tuple) and max(key) > 255:
        raise DataError(f"{name}: 16-bit colour with a transparent colour is not read; save it with an alpha channel")
    try:
        return np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
    except (ValueError, OSError) as error:
        raise _unreadable(name, error) from None


def check_camera_size(shown: Size, stored: Size, told: Size | None, name: str) -> None:
    """DataError unless a camera for pictures of size `told` (None: it says no size) fits a picture of size `shown`."""
    if told == shown or (told is None and shown == stored):
        return
    here, of = f"{shown[0]}x{shown[1]}", "a size that they do not tell" if told is None else f"{told[0]}x{told[1]}"
    if told in (None, stored):
        raise DataError(
            f"{name}: stored as {stored[0]}x{stored[1]} pixels, turned to {here} by its EXIF orientation, and its "
            f"intrinsics are for {of}; save the picture upright without that tag, and give the intrinsics for {here}"
        )
    raise DataError(f"{name}: {here} pixels but its intrinsics are for {of}; scale the intrinsics as the picture was")


def _opened(source: Path | bytes) -> AbstractContextManager[BinaryIO]:
    return io.BytesIO(source) if isinstance(source, bytes) else open_file(source, REMEDY, MAX_BYTES)


def _read_header(file: BinaryIO, name: str) -> Image.Image:
    """What `Image.open(file, formats=FORMATS)` gives, with our bound on the size in place of Pillow's warning."""
    head = file.read(16)
    heif = head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS
    if heif:
        try:
            from pillow_heif import register_heif_opener
        except ImportError:
            raise DataError(
                f"{name}: a HEIC picture, which needs pillow-heif; pip install pillow-heif, or save it as JPEG or PNG"
            ) from None
        register_heif_opener()
    for kind in ("HEIF",) if heif else FORMATS:
        factory, accept = Image.OPEN[kind]
        if accept is not None and accept(head) is not True:
            continue
        file.seek(0)
        try:
            picture = factory(file, "")
            width, height = _stored(picture)
        except Image.DecompressionBombError as error:  # a WebP allocates here, so Pillow's own bound comes before
            raise _too_large(name, _reason(error)) from None
        except Exception as error:  # decoders raise what they like at bytes made to harm
            raise _unreadable(name, error) from None
        if width * height > MAX_PIXELS:
            raise _too_large(name, f"{width}x{height} pixels")
        return picture
    raise DataError(f"{name}: not a readable picture (its content is none of {', '.join(FORMATS)}, HEIC); {REMEDY}")


def _decode(picture: Image.Image, name: str) -> Image.Image:
    try:
        picture.load()
        turn = TURNS.get(picture.getexif().get(0x0112, 1))  # none in a TIFF: Pillow has turned it
        if turn is None:
            return picture
        upright = picture.transpose(turn)
    except Exception as error:
        raise _unreadable(name, error) from None
    upright.info = {key: value for key, value in picture.info.items() if key == "transparency"}  # without the tag
    return upright


def _sizes(picture: Image.Image, stored: Size, name: str) -> tuple[Size, Size]:
    width, height = stored
    try:
        turned = width != height and picture.getexif().get(0x0112) in (5, 6, 7, 8)  # this may decode a PNG
    except Exception as error:
        raise _unreadable(name, error) from None
    return (height, width) if turned else stored, stored


def _stored(picture: Image.Image) -> Size:
    """Width and height before any turn; `size` of a TIFF is after it, in some versions of Pillow."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return picture.tag_v2[TiffImagePlugin.IMAGEWIDTH], picture.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return picture.size


def _too_large(name: str, size: str) -> DataError:
    return DataError(f"{name}: {size}, and at most {MAX_PIXELS:,} pixels in all are read; make the picture smaller")


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(f"{name}: not a readable picture ({_reason(error)}); {REMEDY}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


Picture = Any  # a path, a PIL image, a numpy array [H, W], [H, W, C] or a tensor [H, W], [C, H, W]


def to_pixels(picture: Picture, name: str) -> tuple[Tensor, Tensor | None]:
    """Colours [3, H, W] float32 in [0, 1] and, where it has one, opacity [H, W]; DataError for what is no picture.

    A file's path; a PIL image of any mode; a numpy array [H, W] or [H, W, 1 to 4]; a tensor [H, W] or [1 to 4, H, W].
    Two and four channels hold opacity. Whole numbers are of 8 or 16 bits by their type, others are in [0, 1].
    """
    if isinstance(picture, str | Path):
        picture, name = Path(picture), str(picture)
    if isinstance(picture, Path | Image.Image):
        picture = to_array(open_picture(picture, name), name)
    if isinstance(picture, Tensor):
        if picture.ndim == 3:
            picture = picture.permute(1, 2, 0)
        try:
            picture = (
                (picture.float() if picture.is_floating_point() else picture).detach().cpu().resolve_conj().numpy()
            )
        except (TypeError, RuntimeError):
            raise DataError(f"{name}: a tensor of {picture.dtype} is no picture; give a dense one of numbers") from None
    if not isinstance(picture, np.ndarray):
        raise DataError(f"{name}: {type(picture).__name__} is no picture; give a file, an image, an array or a tensor")
    if picture.ndim == 2:
        picture = picture[..., None]
    if picture.ndim != 3 or not 1 <= picture.shape[2] <= 4 or 0 in picture.shape:
        raise DataError(
            f"{name}: an array of shape {list(picture.shape)} is no picture; arrays are [H, W] or [H, W, channels], "
            "tensors [H, W] or [channels, H, W], with 1 to 4 channels"
        )
    pixels = torch.from_numpy(_to_unit(picture, name)).permute(2, 0, 1)
    has_alpha = len(pixels) in (2, 4)
    colour = pixels[:-1] if has_alpha else pixels
    return colour.expand(3, -1, -1), pixels[-1] if has_alpha else None


def _to_unit(array: np.ndarray, name: str) -> np.ndarray:
    """float32 in [0, 1]; DataError for pixels that are not."""
    if array.dtype in (np.uint8, np.uint16):
        return array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{name}: pixels of type {array.dtype}; expected uint8, uint16, or floats in [0, 1]")
    check_unit_range(array, name)
    return array.astype(np.float32).clip(0.0, 1.0)
