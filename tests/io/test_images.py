"""Pictures are opened in one place: listed formats by content, bounded sizes, upright, right pixels or one line."""

import io
import json
import os
import struct
import sys
import tracemalloc
import types
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from sitdist.build.sources import open_source
from sitdist.cli import main as cli
from sitdist.config.recipe import TransformsSource
from sitdist.errors import DataError
from sitdist.io import images
from sitdist.io.images import open_picture, picture_sizes, to_pixels
from sitdist.scene.photos import read_photos

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
EDGES = {  # EXIF 2.3: which edges of the scene the first row and the first column of the stored picture are
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored(upright, tag):
    """The array that is stored for an upright picture [H, W, ...] with an orientation tag, by EXIF's definition."""
    row, column = EDGES[tag]
    if row in ("left", "right"):
        upright = upright.swapaxes(0, 1)
    upright = upright[::-1] if row in ("bottom", "right") else upright
    return np.ascontiguousarray(upright[:, ::-1] if column in ("bottom", "right") else upright)


def save(path, array, tag=None):
    options = {"tiffinfo": {274: tag}} if path.suffix == ".tif" else {"exif": exif(tag), "quality": 100}
    options |= {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(array).save(path, **({} if tag is None else options))
    return path


def exif(tag):
    values = Image.Exif()
    if tag is not None:
        values[0x0112] = tag
    return values


def checks(height=16, width=24):
    """Squares of 8 pixels of known colours, which JPEG keeps."""
    colours = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 1)).repeat(3, -1)
    return colours.repeat(8, 0).repeat(8, 1).astype(np.uint8)


def posed(folder, names, **values):
    """A transforms.json of these pictures."""
    pose = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 4], [0, 0, 0, 1]]
    frames = [{"file_path": name, "transform_matrix": pose} for name in names]
    (folder / "transforms.json").write_text(json.dumps({"fl_x": 20.0, "frames": frames, **values}))
    return folder


# ----------------------------------------------------------------------------------------------------------- formats


def test_a_postscript_program_is_never_run_whatever_its_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    picture = tmp_path / "holiday.png"
    picture.write_bytes(POSTSCRIPT)
    folder = posed(tmp_path, ["holiday.png"])
    for read in (
        lambda: open_picture(picture),
        lambda: to_pixels(str(picture), "it"),
        lambda: read_photos(folder),
        lambda: open_source(TransformsSource(kind="transforms", path=str(folder)), 8),
        lambda: open_picture(POSTSCRIPT, "bytes"),
    ):
        with pytest.raises(DataError, match=r"not a readable picture .* none of PNG, JPEG, WEBP, GIF, TIFF, BMP"):
            read()
    assert cli.run(["pose", str(tmp_path), str(picture)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "ran").exists()
    with pytest.raises(OSError, match=r"."):  # and the trap is one
        Image.open(picture).load()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_listed_formats_are_told_by_content_and_cut_ones_refused(tmp_path, kind, capfd):
    array = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    options = {"WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_deflate"}}.get(kind, {})
    Image.fromarray(array).save(buffer, kind, **options)
    path = tmp_path / "picture.xyz"
    path.write_bytes(buffer.getvalue())
    pixels = np.asarray(open_picture(path).convert("RGB"))
    assert picture_sizes(path) == ((48, 40), (48, 40))
    if kind in ("JPEG", "GIF"):
        assert pixels.shape == array.shape
    else:
        assert np.array_equal(pixels, array)
    for size in (0, 1, 20, len(buffer.getvalue()) // 2):
        path.write_bytes(buffer.getvalue()[:size])
        with pytest.raises(DataError, match=r"picture\.xyz: not a readable picture"):
            open_picture(path)
    assert capfd.readouterr() == ("", "")  # libtiff is quiet, too


def test_heic_is_read_where_its_plugin_is_and_asked_for_where_it_is_not(monkeypatch):
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DataError, match="it: a HEIC picture, which needs pillow-heif; pip install pillow-heif"):
        open_picture(data, "it")
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=lambda: None))
    monkeypatch.setitem(Image.OPEN, "HEIF", (lambda file, _: Image.new("RGB", (3, 2), (1, 2, 3)), None))
    assert open_picture(data, "it").getpixel((0, 0)) == (1, 2, 3)


# ------------------------------------------------------------------------------------------------------------- sizes


def png(width, height, bits=8, colour=0, rows=b"", extra=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_too_many_pixels_are_refused_by_the_header_before_anything_is_decoded(tmp_path, recwarn):
    bomb = png(20_000, 20_000, bits=1, rows=bytes(20_000 * 2501))  # 50 kB that are 400 million pixels
    tiff = tmp_path / "sparse.tif"
    Image.new("1", (40_000, 2)).save(tiff)
    cut = tiff.read_bytes().replace(struct.pack("<HHII", 257, 4, 1, 2), struct.pack("<HHII", 257, 4, 1, 40_000))
    for data, size in (
        (png(100_000, 100_000), "100000x100000"),
        (png(10_000, 9_000), "10000x9000"),  # Pillow alone would only warn
        (bomb, "20000x20000"),
        (cut, "40000x40000"),
    ):
        path = tmp_path / "big.png"
        path.write_bytes(data)
        tracemalloc.start()
        for read in (open_picture, picture_sizes, lambda path: to_pixels(path, "it")):
            with pytest.raises(DataError, match=f"big.png: {size} pixels, and at most 89,478,485 .*smaller"):
                read(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()
    assert not recwarn.list


def test_a_large_webp_is_refused_too():
    canvas = struct.pack("<I", 16_382)[:3] * 2  # width and height, less 1
    data = b"WEBPVP8X" + struct.pack("<II", 10, 0) + canvas + b"VP8 " + bytes(16)
    with pytest.raises(DataError, match=r"it: .*at most 89,478,485 pixels .*smaller"):
        open_picture(b"RIFF" + struct.pack("<I", len(data)) + data, "it")


def test_what_is_no_regular_file_is_refused_without_hanging(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "huge.png").touch()
    os.truncate(tmp_path / "huge.png", images.MAX_BYTES + 1)  # sparse
    for name, message in (
        ("fifo.png", "not a regular file"),
        ("device.png", "not a regular file"),
        ("folder.png", "is a folder"),
        ("huge.png", "1,073,741,825 bytes, and at most 1,073,741,824 are read"),
        ("nul\0.png", "null byte"),
        ("\ud800.png", "surrogates"),
    ):
        for read in (open_picture, picture_sizes, lambda path: to_pixels(path, "it")):
            with pytest.raises(DataError, match=message):
                read(tmp_path / name)


# ------------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("tag", EDGES)
def test_pictures_are_turned_upright_once(tmp_path, ending, tag):
    upright = checks()
    path = save(tmp_path / f"picture{ending}", stored(upright, tag), tag)
    expected = torch.from_numpy(upright / np.float32(255)).permute(2, 0, 1)
    for picture in (path, open_picture(path), Image.open(path)):
        colour, alpha = to_pixels(picture, "it")
        assert alpha is None
        assert (colour - expected).abs().max() < (0.02 if ending == ".jpg" else 1e-7)
    turned = (24, 16) if tag < 5 else (16, 24)
    assert picture_sizes(path) == ((24, 16), turned)


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_posed_pictures_are_upright_in_datasets_and_scene_fits(tmp_path, ending):
    square, wide = checks(16, 16), checks()
    for tag in EDGES:
        save(tmp_path / f"{tag}{ending}", stored(square, tag), tag)
    names = [f"{tag}{ending}" for tag in EDGES]
    source = open_source(TransformsSource(kind="transforms", path=str(posed(tmp_path, names))), 16)
    expected = torch.from_numpy(square / np.float32(255)).permute(2, 0, 1)
    assert torch.equal(source.images(range(8)), expected.expand(8, -1, -1, -1))
    for tag in EDGES:
        save(tmp_path / f"{tag}{ending}", stored(wide, tag), tag)
    photos = read_photos(posed(tmp_path, names, w=24, h=16))
    assert torch.equal(photos.images, torch.from_numpy(wide).permute(2, 0, 1).expand(8, -1, -1, -1))


def test_a_transparent_picture_stays_transparent_when_it_is_turned(tmp_path):
    grey = Image.fromarray(stored(checks()[..., 0], 6))
    grey.save(tmp_path / "key.png", transparency=int(checks()[0, 0, 0]), exif=exif(6))
    colour, alpha = to_pixels(tmp_path / "key.png", "it")
    assert torch.equal(alpha, (colour[0] != colour[0, 0, 0]).float())


# ------------------------------------------------------------------------------------------------------------- modes


def rows(array):
    """Lines of a PNG of 16 bits."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)


def test_sixteen_bits_are_read_alike_everywhere(tmp_path):
    deep = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        folder = posed(tmp_path, [name])
        expected = torch.from_numpy(deep / np.float32(65535)).expand(3, -1, -1)
        assert torch.allclose(to_pixels(tmp_path / name, "it")[0], expected, atol=1e-7)
        source = open_source(TransformsSource(kind="transforms", path=str(folder)), 4)
        assert torch.allclose(source.images([0])[0], expected, atol=1e-7)
        assert torch.equal(read_photos(folder).images[0], (255 * expected).round().to(torch.uint8))


def test_colour_and_opacity_of_sixteen_bits():
    values = np.random.default_rng(0).integers(0, 65536, (3, 5, 4))
    colour, alpha = to_pixels(open_picture(png(5, 3, 16, 6, rows(values)), "it"), "it")
    assert (colour.permute(1, 2, 0) - torch.from_numpy(values[..., :3] / 65535)).abs().max() < 1 / 255
    assert (alpha - torch.from_numpy(values[..., 3] / 65535)).abs().max() < 1 / 255


def transparent(*key):
    data = struct.pack(f">{len(key)}H", *key)
    return struct.pack(">I", len(data)) + b"tRNS" + data + struct.pack(">I", zlib.crc32(b"tRNS" + data))


def test_a_transparent_grey_of_sixteen_bits_is_kept_and_a_colour_refused():
    grey = np.array([[[300], [40_000]], [[300], [7]]])
    colour, alpha = to_pixels(open_picture(png(2, 2, 16, 0, rows(grey), transparent(300)), "it"), "it")
    assert alpha.tolist() == [[0, 1], [0, 1]]
    assert colour[0, 0, 1] == pytest.approx(40_000 / 65535)
    with pytest.raises(DataError, match="it: 16-bit colour with a transparent colour"):
        to_pixels(open_picture(png(2, 2, 16, 2, rows(grey.repeat(3, -1)), transparent(300, 300, 300)), "it"), "it")


def test_cmyk_palette_bits_and_floats_have_known_pixels(tmp_path):
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    floats = Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4))
    red.convert("CMYK").save(tmp_path / "cmyk.tif")
    red.quantize(2).save(tmp_path / "palette.png")
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    floats.save(tmp_path / "floats.tif")
    for name, pixel in (("cmyk.tif", [1, 0, 0]), ("palette.png", [1, 0, 0]), ("bits.png", [1, 1, 1])):
        assert to_pixels(tmp_path / name, "it")[0][:, 1, 1].tolist() == pixel, name
    assert torch.equal(to_pixels(tmp_path / "floats.tif", "it")[0][0], torch.from_numpy(np.array(floats)))
    for name, array in (("wide", np.full((4, 4), 70_000, np.int32)), ("minus", np.full((4, 4), -1, np.int32))):
        Image.fromarray(array).save(tmp_path / f"{name}.tif")
        with pytest.raises(DataError, match=r"grey values from .*; save it with 8 or 16 bits"):
            to_pixels(tmp_path / f"{name}.tif", "it")
    for value in (200.0, np.nan):
        Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "bad.tif")
        with pytest.raises(DataError, match="pixels"):
            open_source(TransformsSource(kind="transforms", path=str(posed(tmp_path, ["bad.tif"]))), 4).images([0])
