"""Photos as users have them become square pictures of one pinhole camera, with their poses and a recipe."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from sitdist.build.capture import save_sharp_frames
from sitdist.build.matte import Matting
from sitdist.build.photos import PhotoOptions, camera_ranges, prepare_photos
from sitdist.build.sources import open_source
from sitdist.cli.main import run
from sitdist.config.load import load_yaml
from sitdist.config.recipe import Recipe
from sitdist.errors import ConfigError, DataError
from sitdist.geometry.camera import Intrinsics, looks_at_origin, orbit
from sitdist.geometry.distortion import Distortion
from sitdist.io.images import focal_length
from sitdist.io.pose_files import PosedPicture, colmap_files, write_poses
from sitdist.io.transforms import read_posed_files, transforms
from sitdist.scene.field import chair
from sitdist.scene.photos import read_photos
from sitdist.scene.views import look, render

COUNT = 8
CAMERA = Intrinsics(130.0, 120.0, 70.0, 44.0, 128, 96)  # a rectangle, with oblong pixels and an off-centre middle
POSES = orbit(torch.arange(COUNT) * 45.0, 20.0 + 5.0 * torch.arange(COUNT), 4.0, 4.0, (0.2, 0.0, 0.1))


def seen(camera_to_world, camera, supersample=2):
    """Straight colour and opacity, [4, H, W], that a camera sees of the built-in object."""
    rendered = look(chair(), camera_to_world, camera, supersample)
    opacity = 1.0 - rendered.through[None]
    return torch.cat([rendered.light.permute(2, 0, 1) / opacity.clamp_min(1e-6), opacity]).clamp(0.0, 1.0)


def save(picture, path, **options):
    mode = "RGB" if len(picture) == 3 else "RGBA"
    pixels = (picture * 255.0).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels, mode).save(path, **options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos with alpha and their transforms.json; never write into it."""
    folder = tmp_path_factory.mktemp("photos")
    for number, pose in enumerate(POSES):
        save(seen(pose, CAMERA), folder / f"{number:05d}.png")
    (folder / "transforms.json").write_text(json.dumps(transforms(POSES, [CAMERA] * COUNT)))
    return folder


def opaque(folder, background=(0.0, 0.6, 0.2), suffix=".png", **options):
    """The same photos on a plain background."""
    folder.mkdir()
    names = [f"{number:05d}{suffix}" for number in range(COUNT)]
    for name, pose in zip(names, POSES, strict=True):
        save(render(chair(), pose, CAMERA, 2, background), folder / name, **options)
    (folder / "transforms.json").write_text(json.dumps(transforms(POSES, [CAMERA] * COUNT, names)))
    return folder


def on_grey(picture):
    return picture[:3] * picture[3:] + 0.5 * (1.0 - picture[3:])


def read(folder, name="transforms.json"):
    """What was written: frames, and their pictures [N, C, S, S] in [0, 1]."""
    posed = read_posed_files(folder / name)
    arrays = [np.asarray(Image.open(each.picture)) for each in posed]
    return posed, torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255.0


@pytest.mark.parametrize("crop", ["principal", "object"])
def test_pictures_are_what_their_cameras_see(photos, tmp_path, crop):
    prepared = prepare_photos(photos, tmp_path / "out", PhotoOptions(crop=crop, hold_out=4))
    posed, pictures = read(tmp_path / "out")
    assert (prepared.fitted, prepared.held_out) == (6, 2)
    assert len({each.intrinsics for each in posed}) == 1
    camera = posed[0].intrinsics
    assert (camera.width, camera.height, camera.cx, camera.cy) == (64, 64, 32.0, 32.0)
    assert camera.fx == camera.fy == pytest.approx(32.0 / math.tan(math.radians(prepared.fov_deg / 2)))
    for each, picture, pose in zip(posed, pictures, POSES, strict=True):
        torch.testing.assert_close(each.camera_to_world[:3, 3], pose[:3, 3])
        true = seen(each.camera_to_world, camera, 4)
        assert (on_grey(picture) - on_grey(true)).abs().mean() < 0.01
        rows, columns = (picture[3] > 0.5).nonzero().unbind(1)
        assert min(rows.min(), columns.min(), 63 - rows.max(), 63 - columns.max()) > 0  # the whole object
        if crop == "principal":
            torch.testing.assert_close(each.camera_to_world, pose)
        else:
            assert abs(rows.min() + rows.max() - 63) <= 3
            assert abs(columns.min() + columns.max() - 63) <= 3


LENSES = {
    "OPENCV": Distortion("perspective", (-0.15, 0.02, 0.0), (0.004, -0.006)),
    "OPENCV_FISHEYE": Distortion("fisheye", (0.05, 0.0, 0.0, 0.0)),
}


@pytest.mark.parametrize("model", LENSES)
@pytest.mark.parametrize("kind", ["alpha", "opaque"])
def test_pictures_of_photos_through_a_lens_are_what_their_cameras_see(tmp_path, model, kind):
    lens, wider = LENSES[model], Intrinsics(260.0, 240.0, 220.0, 180.0, 440, 360)
    row, column = torch.meshgrid(torch.arange(96) + 0.5, torch.arange(128) + 0.5, indexing="ij")
    place = lens.undistort(torch.stack([(column - CAMERA.cx) / CAMERA.fx, (row - CAMERA.cy) / CAMERA.fy], dim=-1))
    grid = (place * torch.tensor([260.0, 240.0]) + torch.tensor([220.0, 180.0])) / torch.tensor([220.0, 180.0]) - 1.0
    for number, pose in enumerate(POSES):
        true = seen(pose, wider) if kind == "alpha" else on_grey(seen(pose, wider))
        through = functional.grid_sample(true[None], grid[None].float(), align_corners=False)[0]
        save(through, tmp_path / f"{number:05d}.png")
    names = ("k1", "k2", "k3", "k4") if lens.kind == "fisheye" else ("k1", "k2", "k3")
    values = dict(zip(names, lens.radial, strict=True)) | dict(zip(("p1", "p2"), lens.tangential, strict=True))
    values |= transforms(POSES, [CAMERA] * COUNT) | {"camera_model": model}
    (tmp_path / "transforms.json").write_text(json.dumps(values))
    prepare_photos(tmp_path, tmp_path / "out")
    posed, pictures = read(tmp_path / "out")
    for each, picture in zip(posed, pictures, strict=True):
        true = on_grey(seen(each.camera_to_world, each.intrinsics, 4))
        assert ((on_grey(picture) if kind == "alpha" else picture) - true).abs().mean() < 0.01


def test_every_nth_photo_is_held_out(photos, tmp_path):
    prepare_photos(photos, tmp_path / "out", PhotoOptions(size=16, hold_out=3))
    names = {
        name: [each.picture.name for each in read(tmp_path / "out", f"{name}.json")[0]] for name in ("train", "test")
    }
    assert names["test"] == ["00000.png", "00003.png", "00006.png"]
    assert sorted(names["train"] + names["test"]) == [f"{number:05d}.png" for number in range(COUNT)]
    prepare_photos(photos, tmp_path / "all", PhotoOptions(size=16, hold_out=0))
    assert not (tmp_path / "all" / "test.json").exists()
    assert len(read(tmp_path / "all", "train.json")[0]) == COUNT


def test_opaque_photos_are_cut_to_what_all_of_them_show(tmp_path):
    prepared = prepare_photos(opaque(tmp_path / "photos"), tmp_path / "out", PhotoOptions(size=32))
    _, pictures = read(tmp_path / "out")
    assert prepared.fov_deg == pytest.approx(2 * math.degrees(math.atan(44.0 / 120.0)), abs=1e-6)
    assert pictures.shape[1] == 3
    assert prepared.background_known
    torch.testing.assert_close(pictures[:, :, 0, 0], torch.tensor([0.0, 0.6, 0.2]).expand(COUNT, 3), atol=0.01, rtol=0)
    background = load_yaml(Recipe, tmp_path / "out" / "recipe.yaml").sources("train")[0].background
    assert background is None  # the scene's own, which its fit learns from the photos


def test_a_colour_key_and_masks_give_the_object_that_alpha_gives(photos, tmp_path):
    keyed = opaque(tmp_path / "photos")
    masks = tmp_path / "masks"
    masks.mkdir()
    for number, pose in enumerate(POSES):
        save(seen(pose, CAMERA)[3:].expand(3, -1, -1), masks / f"{number:05d}.jpg", quality=98)
    prepare_photos(photos, tmp_path / "alpha", PhotoOptions())
    _, true = read(tmp_path / "alpha")
    for name, matting in (("key", Matting(key=(0.0, 0.6, 0.2), tolerance=0.03)), ("masks", Matting(masks=masks))):
        prepare_photos(keyed, tmp_path / f"by_{name}", PhotoOptions(matting=matting))
        _, pictures = read(tmp_path / f"by_{name}")
        assert (pictures[:, 3] - true[:, 3]).abs().mean() < 0.02, name
        assert (pictures[:, 3, 0] == 0.0).all(), name


def test_orientation_and_focal_length_are_read_from_a_jpeg(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    exif.get_ifd(0x8769)[0xA405] = 50
    upright = Intrinsics.from_fov(2 * math.degrees(math.atan(0.5 * 96 / 160 * math.hypot(36, 24) / 50)), 96, 128)
    for number, pose in enumerate(POSES):
        picture = render(chair(), pose, upright, 2, (1.0, 1.0, 1.0))
        save(picture.rot90(1, (1, 2)), photos / f"{number}.jpg", quality=95, exif=exif)
    assert focal_length(photos / "0.jpg") == pytest.approx(upright.fx)
    frames = [{"file_path": f"{number}.jpg", "transform_matrix": pose.tolist()} for number, pose in enumerate(POSES)]
    (photos / "transforms.json").write_text(json.dumps({"frames": frames}))
    prepare_photos(photos, tmp_path / "out", PhotoOptions())
    posed, pictures = read(tmp_path / "out")
    true = torch.stack([render(chair(), each.camera_to_world, each.intrinsics, 4, (1.0, 1.0, 1.0)) for each in posed])
    assert (pictures - true).abs().mean() < 0.01


def test_photos_without_a_file_are_left_out_and_counted(photos, tmp_path, capsys):
    values = json.loads((photos / "transforms.json").read_text())
    values["frames"].insert(2, {**values["frames"][2], "file_path": "gone.png"})
    listed = photos / "with_gone.json"
    listed.write_text(json.dumps(values))
    assert run(["photos", str(listed), "--out", str(tmp_path / "out"), "--size", "16"]) == 0
    assert "7 photos to fit, 1 held out" in (said := capsys.readouterr().out)
    assert "1 without a file" in said
    with pytest.raises(DataError, match=r"gone\.png"):
        prepare_photos(listed, tmp_path / "strict", PhotoOptions(strict=True))
    assert not (tmp_path / "strict").exists()


def test_a_colmap_model_poses_the_photos_beside_it(photos, tmp_path):
    (tmp_path / "photos" / "images").mkdir(parents=True)
    picked = []
    for number, pose in enumerate(POSES):
        path = tmp_path / "photos" / "images" / f"{number}.png"
        path.write_bytes((photos / f"{number:05d}.png").read_bytes())
        picked.append(PosedPicture(path, pose, CAMERA, {}))
    write_poses(picked, "colmap", tmp_path / "photos" / "sparse")
    prepare_photos(tmp_path / "photos", tmp_path / "out", PhotoOptions(size=16))
    prepare_photos(photos, tmp_path / "same", PhotoOptions(size=16))
    assert torch.equal(read(tmp_path / "out")[1], read(tmp_path / "same")[1])


def test_the_recipe_renders_from_where_the_photos_were_taken(photos, tmp_path, ball_scene):
    prepare_photos(photos, tmp_path / "out", PhotoOptions(size=32))
    recipe = load_yaml(Recipe, tmp_path / "out" / "recipe.yaml")
    train, test = recipe.sources("train")[0], recipe.sources("test")[0]
    assert recipe.image_size == 32
    assert train.scene == str(tmp_path / "out" / "scene")
    assert train.seed != test.seed
    source = open_source(train.model_copy(update={"scene": str(ball_scene), "views": 16}), 32)
    posed, _ = read(tmp_path / "out")
    assert source.intrinsics(0).fx == pytest.approx(posed[0].intrinsics.fx, rel=1e-4)
    # the photos' cameras stand 20 to 55 degrees high about (0.2, 0, 0.1), which is their frame's origin
    low, high = train.elevation_deg
    assert low == pytest.approx(18.0, abs=1.0)
    assert high == pytest.approx(57.0, abs=1.0)
    assert train.roll_deg == pytest.approx(5.0, abs=1.0)


def test_ranges_of_cameras_hold_them_all():
    generator = torch.Generator().manual_seed(0)
    azimuth = 300.0 + 120.0 * torch.rand(50, generator=generator)
    target = 0.2 * (torch.rand(50, 3, generator=generator) - 0.5)
    radius = 3.0 + torch.rand(50, generator=generator)
    cameras = orbit(azimuth, 30.0, radius, 40.0 * torch.rand(50, generator=generator) - 20.0)
    cameras[:, :3, 3] += target
    ranges = camera_ranges(cameras)
    low, high = ranges["azimuth_deg"]
    assert 115.0 < high - low < 135.0
    assert low == pytest.approx(-62.0, abs=10.0)
    assert 18.0 < ranges["roll_deg"] <= 22.0
    assert 0.05 < ranges["target_jitter"] < 0.2
    assert ranges["radius"][0] < 3.05
    assert ranges["radius"][1] > 3.95
    plain = camera_ranges(orbit(torch.arange(12) * 30.0, 10.0, 4.0))
    assert set(plain) == {"radius", "elevation_deg"}  # all around, at the origin, upright
    assert looks_at_origin(orbit(torch.arange(12) * 30.0, 10.0, 4.0)).all()


def test_a_scene_is_fitted_to_what_was_written(photos, tmp_path):
    prepare_photos(photos, tmp_path / "out", PhotoOptions(size=32))
    fitted = read_photos(tmp_path / "out" / "train.json")
    assert len(fitted) == 7
    torch.testing.assert_close(fitted.pictures([0])[0, :, 0, 0], torch.ones(3))  # what is transparent lies on white


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "60"], "give 64"),
        (["--masks", "EMPTY"], "no mask for 00000.png"),
        (["--key", "0.5", "0.5", "0.5", "--key-tolerance", "1"], "nothing in it is opaque"),
        (["--hold-out", "1"], "0 photos to fit"),
        (["--remove-background"], "pip install 'rembg[cpu]'"),
        (["--out", "EMPTY"], "already exists"),
    ],
)
def test_what_cannot_be_done_is_one_line(photos, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setitem(sys.modules, "rembg", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    assert run(["photos", str(photos), "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in said
    assert not (tmp_path / "out").exists()


def test_photos_that_lack_something_name_what_gives_it(tmp_path, monkeypatch):
    for name in ("pycolmap", "av"):
        monkeypatch.setitem(sys.modules, name, None)
    for number in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.jpg")
    with pytest.raises(DataError, match=r"pycolmap.*sitdist\[photos\]"):
        prepare_photos(tmp_path, tmp_path / "out")
    (tmp_path / "turn.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"PyAV.*sitdist\[photos\]"):
        prepare_photos(tmp_path / "turn.mp4", tmp_path / "out")
    with pytest.raises(ConfigError, match="--crop object"):
        prepare_photos(opaque(tmp_path / "plain"), tmp_path / "out", PhotoOptions(crop="object"))
    Image.new("RGB", (128, 96)).save(tmp_path / "plain" / "00000.png")
    mixed = Image.open(tmp_path / "plain" / "00001.png").convert("RGBA")
    mixed.save(tmp_path / "plain" / "00001.png")  # its alpha is opaque everywhere, as if it had none
    prepare_photos(tmp_path / "plain", tmp_path / "out", PhotoOptions(size=16))
    mixed.putpixel((0, 0), (0, 0, 0, 0))
    mixed.save(tmp_path / "plain" / "00001.png")
    with pytest.raises(DataError, match="give all of them alpha"):
        prepare_photos(tmp_path / "plain", tmp_path / "mixed")


def write_video(path, pictures, blurred):
    """Every second of a film has one sharp and several blurred pictures."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 128, 96, "yuv420p", 4_000_000
        for number, picture in enumerate(pictures):
            pixels = functional.avg_pool2d(picture, 5, 1, 2) if number in blurred else picture
            array = (pixels * 255.0).to(torch.uint8).permute(1, 2, 0).numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))


def test_the_sharpest_frame_of_every_stretch_of_a_video_is_taken(tmp_path):
    pictures = [render(chair(), pose, CAMERA, 1, (1.0, 1.0, 1.0)) for pose in POSES]
    sharp = [1, 3, 4, 7]  # one in each stretch of two
    write_video(tmp_path / "turn.mp4", pictures, set(range(COUNT)) - set(sharp))
    save_sharp_frames(tmp_path / "turn.mp4", 4, tmp_path / "frames")
    saved = sorted((tmp_path / "frames").iterdir())
    assert len(saved) == 4
    for file, number in zip(saved, sharp, strict=True):
        frame = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255.0
        nearest = min(range(COUNT), key=lambda other: float((frame - pictures[other]).square().mean()))
        assert nearest == number


def test_photos_that_the_reconstruction_places_come_back_with_their_own_names(tmp_path, monkeypatch):
    """A COLMAP that places all pictures but the second; poses are those of `POSES`."""
    given = {}

    class Model:
        def num_reg_images(self):
            return COUNT - 1

        def write_text(self, folder):
            pictures = sorted(given["pictures"].iterdir())
            posed = [PosedPicture(path, pose, CAMERA, {}) for path, pose in zip(pictures, POSES, strict=True)]
            for name, text in colmap_files(posed[:1] + posed[2:]).items():
                (folder / name).write_text(text)

    class Reader(SimpleNamespace):
        camera_params = ""

    stub = SimpleNamespace(
        CameraMode=SimpleNamespace(SINGLE="single", PER_IMAGE="each"),
        ImageReaderOptions=Reader,
        logging=SimpleNamespace(minloglevel=0),
        set_random_seed=lambda seed: None,
        extract_features=lambda database, pictures, camera_mode, reader_options: given.update(
            pictures=pictures, mode=camera_mode, reader=reader_options
        ),
        match_exhaustive=lambda database: None,
        incremental_mapping=lambda database, pictures, out: {0: Model()},
    )
    monkeypatch.setitem(sys.modules, "pycolmap", stub)
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    exif.get_ifd(0x8769)[0xA405] = 40
    for number, pose in enumerate(POSES):
        picture = render(chair(), pose, CAMERA, 1, (1.0, 1.0, 1.0))
        save(picture.flip(1, 2), folder / f"IMG_{number}.jpg", quality=95, exif=exif)
    prepared = prepare_photos(folder, tmp_path / "out", PhotoOptions(size=16))
    assert (prepared.fitted, prepared.held_out, prepared.without_pose) == (6, 1, 1)
    assert given["mode"] == "single"
    assert given["reader"].camera_params.startswith(f"{focal_length(folder / 'IMG_0.jpg')},64.0,48.0")
    frames = json.loads((tmp_path / "out" / "transforms.json").read_text())["frames"]
    assert [frame["source"] for frame in frames] == [f"IMG_{number}.jpg" for number in range(COUNT) if number != 1]
    posed, pictures = read(tmp_path / "out")
    torch.testing.assert_close(posed[1].camera_to_world, POSES[2], atol=1e-6, rtol=0)
    true = render(chair(), POSES[2], posed[1].intrinsics, 4, (1.0, 1.0, 1.0))
    assert (pictures[1] - true).abs().mean() < 0.02


def test_a_keyed_photo_on_another_background_has_no_fringe(tmp_path):
    camera = Intrinsics.from_fov(40.0, 96, 96)
    for backdrop in ((0.0, 0.0, 0.0), (0.0, 0.6, 0.2)):
        save(render(chair(), POSES[0], camera, 3, backdrop), tmp_path / "photo.png")
        light, opacity = Matting(key=backdrop, tolerance=0.03).read(tmp_path / "photo.png")
        error = light + (1.0 - opacity) - render(chair(), POSES[0], camera, 3, (1.0, 1.0, 1.0))
        assert -10.0 * error.square().mean().log10() > 27.0
