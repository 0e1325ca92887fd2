"""A trained model in Python: what it renders and estimates, in which frame, and what it refuses."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sitdist
from sitdist.build.writer import build
from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml, parse
from sitdist.config.recipe import Recipe
from sitdist.dataset.reader import ShardReader
from sitdist.errors import CheckpointError, ConfigError, DataError, PoseError, SitdistError
from sitdist.flow.estimate import EstimateOptions
from sitdist.flow.sample import SampleOptions
from sitdist.geometry.camera import Intrinsics, look_at
from sitdist.geometry.similarity import Similarity
from sitdist.inference.flow import Flow
from sitdist.train.trainer import train

TURNED = Similarity(
    2.0,
    torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).double(),
    torch.tensor([1.0, 2.0, 3.0]).double(),
)


@pytest.fixture(scope="module")
def flow(tiny_run):
    return sitdist.load(tiny_run)


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    from sitdist.inference.export import export_run

    folder = tmp_path_factory.mktemp("export") / "model"
    export_run(tiny_run, folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tiny_dataset):
    return ShardReader(tiny_dataset, "test").images(range(8))


@pytest.fixture(scope="module")
def poses(tiny_dataset):
    return ShardReader(tiny_dataset, "test").camera_to_world()[:8]


# ---------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_depends_on_its_pose_and_the_seed_alone(flow, poses):
    together = flow.render(poses)
    assert together.shape == (8, 3, 16, 16)
    assert together.dtype == torch.float32
    assert 0.0 <= float(together.min()) < float(together.max()) <= 1.0
    assert torch.allclose(flow.render(poses, batch=3), together, atol=1e-5)
    assert torch.allclose(flow.render(poses[5])[0], together[5], atol=1e-5)
    assert torch.equal(flow.render(poses.tolist()), together)
    assert torch.equal(flow.render(poses.numpy()), together)
    assert (together[0] - together[1]).abs().max() > 1e-3
    assert (flow.render(poses, seed=1) - together).abs().max() > 1e-4
    assert (flow.render(poses, options=replace(flow.sample_options, steps=9)) - together).abs().max() > 1e-6
    assert (flow.render(poses, options=replace(flow.sample_options, generator="heun")) - together).abs().max() > 1e-6


def test_another_camera_sees_a_part_of_the_picture_or_more(flow, poses):
    whole = flow.render(poses[:2])
    camera = flow.camera
    middle = Intrinsics(camera.fx, camera.fy, 4.0, 4.0, 8, 8)
    assert torch.allclose(flow.render(poses[:2], middle), whole[:, :, 4:12, 4:12], atol=1e-6)
    wide = Intrinsics(camera.fx, camera.fy, 16.0, 16.0, 32, 32)
    out = flow.render(poses[:2], [wide, wide])
    assert torch.allclose(out[:, :, 8:24, 8:24], whole, atol=1e-6)
    assert torch.allclose(out[:, :, 0], torch.full((2, 3, 32), 0.5))
    numbers = flow.render(poses[:2], [camera.fx, camera.fy, camera.cx + 3.0, camera.cy])
    assert torch.allclose(numbers[:, :, :, 3:], whole[:, :, :, :-3], atol=1e-6)


def test_a_turntable_is_a_closed_circle_at_the_middle_of_the_training_radii(flow):
    low, high = flow.training_radius
    poses = flow.turntable(6, elevation_deg=30.0)
    assert torch.allclose(poses[:, :3, 3].norm(dim=-1), torch.full((6,), 0.5 * (low + high)).double())
    assert torch.allclose(poses[:, 2, 3], torch.full((6,), 0.25 * (low + high)).double())
    assert torch.allclose(flow.turntable(4, 2.0, 0.0)[1, :3, 3], torch.tensor([0.0, 2.0, 0.0]).double(), atol=1e-12)


def test_a_model_that_packs_intrinsics_renders_those_it_is_given(tiny_yaml, tiny_dataset, tmp_path):
    recipe = {
        "name": "packed",
        "image_size": 16,
        "packing": "intrinsics",
        "codec": {"kind": "pca", "patch": 4, "fit_views": 32},
        "val_views": 8,
        "splits": {"train": {"kind": "scene", "views": 40, "fov_range_deg": [30.0, 60.0]}},
    }
    build(parse(Recipe, recipe, "packed"), tmp_path / "data")
    overrides = [f"data={tmp_path / 'data'}", "train.steps=60"]
    train(load_yaml(Config, tiny_yaml, overrides), tmp_path / "run")
    flow = sitdist.load(tmp_path / "run")
    pose = flow.turntable(1)
    near, far = (flow.render(pose, Intrinsics.from_fov(fov, 16, 16)) for fov in (30.0, 60.0))
    assert (near - far).abs().max() > 0.01
    assert torch.equal(flow.render(pose), flow.render(pose, flow.camera))
    estimate = flow.estimate(near)
    assert estimate.intrinsics.shape == (1, 4)
    assert flow.render(pose, Intrinsics.from_fov(40.0, 24, 12)).shape == (1, 3, 12, 24)


# ------------------------------------------------------------------------------------------------------------- poses


def test_poses_are_those_of_the_evaluation(flow, pictures, tiny_run):
    from sitdist.flow.estimate import estimate_pose
    from sitdist.geometry.packing import PoseStatistics
    from sitdist.inference.run import load_run
    from sitdist.model.codec import latent_mean

    run = load_run(tiny_run)
    latents = latent_mean(run.codec.encode_moments(pictures))
    labels, statistics = torch.zeros(8, dtype=torch.int64), PoseStatistics.from_dict(run.manifest.statistics)
    expected = estimate_pose(run.model, run.interpolant, latents, labels, statistics)
    estimate = flow.estimate(pictures)
    assert torch.equal(estimate.camera_to_world, expected.camera_to_world)
    assert torch.equal(estimate.so3_residual, expected.so3_residual)
    assert torch.allclose(flow.estimate(pictures, batch=3).camera_to_world, expected.camera_to_world, atol=1e-5)
    heun = flow.estimate(pictures, options=EstimateOptions("heun", 3))
    assert heun.function_evaluations.tolist() == [6] * 8
    assert (heun.camera_to_world - expected.camera_to_world).abs().max() > 1e-6


def test_pictures_of_every_kind_give_the_same_pose(flow, pictures, tmp_path):
    arrays = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    expected = flow.estimate(pictures).camera_to_world
    files = []
    for number, array in enumerate(arrays):
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(array).save(files[-1])
    opaque = np.concatenate([arrays, np.full((8, 16, 16, 1), 255, np.uint8)], -1)
    for kind in (arrays, list(arrays), files, [Image.fromarray(array) for array in arrays], list(map(str, files))):
        assert torch.equal(flow.estimate(kind).camera_to_world, expected)
    assert torch.equal(flow.estimate(opaque).camera_to_world, expected)
    assert torch.allclose(flow.estimate(files[3]).camera_to_world, expected[3:4], atol=1e-4)
    assert torch.equal(flow.estimate(arrays, mask=np.ones((8, 16, 16))).camera_to_world, expected)
    half = np.ones((8, 16, 16))
    half[:, :, 8:] = 0
    assert (flow.estimate(arrays, mask=half).camera_to_world - expected).abs().max() > 1e-3
    assert torch.equal(flow.estimate(arrays, intrinsics=flow.camera).camera_to_world, expected)
    camera = flow.camera
    other = flow.estimate(arrays, intrinsics=[2 * camera.fx, 2 * camera.fy, camera.cx, camera.cy])
    assert (other.camera_to_world - expected).abs().max() > 1e-3


def test_intrinsics_for_the_stored_size_of_a_turned_picture_are_refused(flow, tmp_path):
    upright = np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    camera = Intrinsics(20.0, 21.0, 8.0, 12.0, 16, 24)
    expected = flow.estimate(upright, camera).camera_to_world
    exif = Image.Exif()
    for tag, turns in ((6, 1), (3, 2)):
        exif[0x0112] = tag  # a quarter or half turn clockwise makes the picture upright
        path = tmp_path / f"{tag}.png"
        Image.fromarray(np.ascontiguousarray(np.rot90(upright, turns))).save(path, exif=exif)
    for picture in (tmp_path / "6.png", str(tmp_path / "6.png"), Image.open(tmp_path / "6.png")):
        assert torch.equal(flow.estimate(picture, camera).camera_to_world, expected)
        assert torch.equal(flow.estimate(picture).camera_to_world, flow.estimate(upright).camera_to_world)
        for given in (Intrinsics(20.0, 21.0, 12.0, 8.0, 24, 16), [20.0, 21.0, 8.0, 12.0]):
            with pytest.raises(DataError, match=r"stored as 24x16 pixels, turned to 16x24 by its EXIF .*; save the"):
                flow.estimate(picture, given)
    for given in (camera, camera.to_list()):  # half a turn keeps the size
        assert torch.equal(flow.estimate(tmp_path / "3.png", given).camera_to_world, expected)
    for wrong in ({"fx": float("inf")}, {"fy": 1e12}, {"cx": 1e9}, {"width": 2.5}, {"height": 0}, {"fx": "20"}):
        with pytest.raises(DataError):
            flow.estimate(upright, replace(camera, **wrong))


def test_poses_in_the_users_frame_go_there_and_back(exported, pictures, tmp_path):
    moved = shutil.copytree(exported, tmp_path / "moved")
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["objects"][0]["similarity"] = TURNED.to_dict()
    (moved / "manifest.json").write_text(json.dumps(manifest))
    flow = sitdist.load(moved)
    ours, users = (flow.estimate(pictures, frame=frame).camera_to_world for frame in ("dataset", "user"))
    assert torch.allclose(TURNED.cameras(users), ours)
    assert (users - ours).abs().max() > 0.5
    pose = flow.turntable(2)
    back = TURNED.inverse().cameras(pose)
    assert torch.allclose(flow.render(back, frame="user"), flow.render(pose), atol=1e-5)
    same = sitdist.load(exported)
    assert torch.equal(same.estimate(pictures, frame="user").camera_to_world, ours)  # these were never moved


# ----------------------------------------------------------------------------------------------------------- refusals

BEHIND = look_at(torch.tensor([0.0, 3.0, 1.0])) @ torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0])).double()  # OpenCV


@pytest.mark.parametrize(
    ("pose", "message"),
    [
        (np.eye(3), r"camera_to_world: shape \[3, 3\]|shape \[1, 3, 3\]"),
        (np.zeros((0, 4, 4)), "N above 0"),
        ("pose", "camera_to_world: no numbers but str"),
        (2.0 * np.eye(4), "pose 0: last row of the pose"),
        (np.diag([1.0, 1.0, 2.0, 1.0]), "pose 0: pose is not rigid"),
        (np.full((4, 4), np.nan), "pose 0: pose holds NaN"),
        (
            torch.stack([look_at(torch.tensor([0.0, 3.0, 1.0])), BEHIND]),
            r"pose 1: its camera looks away from the origin",
        ),
        (BEHIND, "negate columns 2 and 3 of OpenCV poses"),
    ],
)
def test_a_pose_that_cannot_be_rendered_is_named(flow, pose, message):
    with pytest.raises(PoseError, match=message):
        flow.render(pose)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda flow, images: flow.estimate([]), "no pictures; give one or more"),
        (
            lambda flow, images: flow.estimate(images, label=3),
            r"label 3: the model knows no such object; .* 0 \(object 0\)",
        ),
        (lambda flow, images: flow.render(np.eye(4), label=1), "label 1: the model knows no such object"),
        (lambda flow, images: flow.estimate(images, mask=np.ones((2, 16, 16))), "2 masks for 8 pictures"),
        (lambda flow, images: flow.estimate(images, [[1.0, 2.0]]), r"intrinsics of shape \[1, 2\]"),
        (lambda flow, images: flow.estimate(images, [flow.camera] * 3), "3 intrinsics for 8 views"),
        (lambda flow, images: flow.estimate(images, [1.0, 0.0, 2.0, 2.0]), "picture 0: focal length 0 for 16 pixels"),
    ],
)
def test_what_does_not_fit_is_named(flow, pictures, call, message):
    with pytest.raises(DataError, match=message):
        call(flow, pictures)


NAN = float("nan")
POSE = look_at(torch.tensor([[4.0, 0.0, 1.0]]))
GREY = np.full((16, 16, 3), 0.5)


def absurd_intrinsics(**changes):
    return Intrinsics(**({"fx": 20.0, "fy": 20.0, "cx": 8.0, "cy": 8.0, "width": 16, "height": 16} | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda it: it.turntable("a"), "views 'a': expected a whole number from 1"),
        (lambda it: it.turntable(10**9), r"a turntable of 1,000,000,000 views: about 700.0 GB of memory"),
        (lambda it: it.turntable(2, "x"), "radius 'x': expected a number from 1e-06"),
        (lambda it: it.turntable(2, 1e300), "radius 1e\\+300: "),
        (lambda it: it.turntable(2, elevation_deg=NAN), "elevation_deg nan: expected a number from -90 to 90"),
        (lambda it: it.orbit("east", 0.0), "azimuth_deg: no numbers but str"),
        (lambda it: it.orbit(torch.tensor([NAN]), 0.0), "azimuth_deg: expected angles in degrees"),
        (lambda it: it.render(POSE.to(torch.complex64)), "camera_to_world: no numbers but torch.complex64"),
        (lambda it: it.render([["1"] * 4] * 4), "camera_to_world: no numbers but list"),
        (
            lambda it: it.render(torch.eye(4).index_put((torch.tensor(0), torch.tensor(3)), torch.tensor(1e30))),
            r"pose 0: position .*e\+30",
        ),
        (lambda it: it.render(POSE, batch="a"), "batch 'a': expected a whole number from 1"),
        (lambda it: it.render(POSE, seed=2**64), "seed 18446744073709551616: expected a whole number from 0 to"),
        (lambda it: it.render(POSE, label=1.5), "label 1.5: expected a whole number"),
        (lambda it: it.turntable(0), "views 0: expected a whole number from 1"),
        (lambda it: it.estimate(GREY, frame="world"), "frame 'world': unknown; choose one of dataset, user"),
        (lambda it: it.render(POSE, frame=None), "frame None: unknown; choose one of dataset, user"),
        (lambda it: it.render(POSE, options=EstimateOptions()), "expected SampleOptions"),
        (
            lambda it: it.render(POSE, absurd_intrinsics(fx="a")),
            "pose 0: fx, fy, cx, cy, .*'a'.*expected finite numbers",
        ),
        (lambda it: it.render(POSE, absurd_intrinsics(fy=1e-5)), "pose 0: focal length 1e-05 for 16 pixels"),
        (
            lambda it: it.render(POSE, absurd_intrinsics(width=1.5)),
            "pose 0: a camera for 1.5x16 pixels; expected whole",
        ),
        (
            lambda it: it.render(POSE.expand(99, 4, 4), Intrinsics.from_fov(40.0, 9000, 9000)),
            "99 pictures of up to 9000x9000 pixels, 64 at a time: about 192.5 GB of memory",
        ),
        (lambda it: it.render(POSE, "abc"), "intrinsics: no numbers but str"),
        (lambda it: it.render(POSE, []), "0 intrinsics for 1 views"),
        (lambda it: it.estimate(np.zeros((0, 16, 16, 3))), "no pictures; give one or more"),
        (lambda it: it.estimate(None), "picture 0: NoneType is no picture"),
        (lambda it: it.estimate(torch.zeros(3, 16, 16, dtype=torch.complex64)), "pixels of type complex64"),
        (lambda it: it.estimate(torch.zeros(3, 16, 16).to_sparse()), "is no picture"),
        (lambda it: it.estimate(GREY * 1e300), "pixels from"),
        (lambda it: it.estimate(GREY, batch=0), "batch 0: "),
        (lambda it: it.estimate(GREY, zooms=[]), r"zooms \[\]: give one or more, from 0.01 to 100"),
        (lambda it: it.estimate(GREY, zooms=[1e-300]), "zooms .*: give one or more"),
        (lambda it: it.estimate(GREY, zooms="1"), "zooms: no numbers but str"),
        (lambda it: it.estimate(GREY, scene=5), "scene 5: expected the folder of a scene"),
        (lambda it: it.estimate(GREY, scene="n" * 300), "File name too long"),
        (lambda it: it.estimate(GREY, options=3), "options 3: expected EstimateOptions"),
        (lambda it: it.to("foo"), "device 'foo': there is none here; choose one of auto, cpu"),
        (lambda it: it.to("cuda:99"), "device 'cuda:99': "),
        (lambda it: it.similarity("0"), "label '0': "),
        (lambda it: it.calibration("one_step"), "expected EstimateOptions"),
        (lambda it: EstimateOptions(steps=0), "estimator steps 0: expected a whole number from 1"),
        (lambda it: EstimateOptions(generator="eular"), "estimator generator 'eular': unknown"),
        (lambda it: SampleOptions(steps=10**9), "steps 1000000000: expected a whole number from 1 to 1000000"),
        (lambda it: SampleOptions(generator="eular"), "generator 'eular': unknown; choose one of euler"),
        (lambda it: SampleOptions(guidance="x"), "guidance 'x': "),
        (lambda it: SampleOptions(tolerance=0.0), "tolerance 0.0: "),
    ],
)
def test_an_argument_that_cannot_be_is_named_in_one_line(flow, call, message):
    with pytest.raises(SitdistError, match=message) as caught:
        call(flow)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800
    assert flow.device.type == "cpu"


def test_numbers_of_every_kind_mean_the_same(flow, poses):
    plain = flow.render(poses[:2], seed=3)
    pose = poses[:2].numpy()
    assert torch.equal(flow.render(pose, seed=np.int64(3), label=torch.tensor(0), batch=np.uint8(2)), plain)
    exact = torch.eye(4, dtype=torch.float64)[None]
    exact[:, 2, 3] = 4.0
    for kind in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64):
        assert torch.equal(flow.render(exact.to(kind)), flow.render(exact))
    half = torch.full((3, 16, 16), 0.5)
    expected = flow.estimate(half).camera_to_world
    for kind in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        assert torch.equal(flow.estimate(half.to(kind)).camera_to_world, expected)


def test_a_model_says_what_it_was_not_trained_for(tiny_yaml, tmp_path, pictures):
    for number, (setting, call, message) in enumerate(
        [
            (
                ["flow.share_at_one=1.0", "flow.share_at_zero=0.0"],
                lambda it: it.render(it.turntable(1)),
                "renders no pict",
            ),
            (["flow.share_at_one=0.0", "flow.share_at_zero=1.0"], lambda it: it.estimate(pictures), "reads no poses"),
        ]
    ):
        train(load_yaml(Config, tiny_yaml, [*setting, "train.steps=1"]), tmp_path / str(number))
        with pytest.raises(ConfigError, match=message):
            call(sitdist.load(tmp_path / str(number)))


# ------------------------------------------------------------------------------------------------------------ loading


def test_a_run_an_export_and_one_of_its_steps_are_loaded(tiny_run, exported, flow):
    assert isinstance(sitdist.load(str(exported)), Flow)
    assert sitdist.load(tiny_run, step=6).run.step == flow.run.step == 6
    assert flow.to("cpu").device.type == "cpu"
    white = sitdist.load(exported, background=(1.0, 1.0, 1.0))
    assert white.preprocess.background(0).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ConfigError, match=r"step 6: .* is an export, which holds one step"):
        sitdist.load(exported, step=6)
    with pytest.raises(CheckpointError, match="step_00000005"):
        sitdist.load(tiny_run, step=5)


def test_a_hub_id_is_had_from_the_hub_or_refused_in_one_line(exported, monkeypatch, flow, pictures):
    import huggingface_hub

    asked = []

    def snapshot(name, **options):
        asked.append((name, options))
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    loaded = sitdist.load("user/chair")
    assert torch.equal(loaded.estimate(pictures).camera_to_world, flow.estimate(pictures).camera_to_world)
    assert asked == [("user/chair", {"allow_patterns": ["*.json", "*.safetensors", "README.md"]})]

    def offline(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot reach the hub\nand nothing is cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DataError) as refused:
        sitdist.load("user/chair")
    assert str(refused.value) == (
        "user/chair: no such folder, and no such model could be had from the hub (Cannot reach the hub and nothing is "
        "cached); check the name and the network, or download it first and give its folder"
    )


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("/nowhere/at/all", DataError, "/nowhere/at/all: no such folder; give a run, an exported folder, or a hub id"),
        ("nowhere", DataError, "nowhere: no such folder"),
        (".", CheckpointError, "has no whole checkpoint"),
        ("x" * 300, DataError, "no such folder"),
        ("a\0b", DataError, "no such folder"),
    ],
)
def test_what_is_no_model_is_named(tmp_path, monkeypatch, path, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        sitdist.load(path)


@pytest.mark.parametrize(
    "background", [(0.5, 0.5), (0.5, 0.5, 2.0), (0.5, 0.5, float("nan")), (-0.1, 0.0, 0.0), ("1", "1", "1"), 5, [[1]]]
)
def test_what_is_no_colour_is_no_background(exported, background):
    with pytest.raises(ConfigError, match="expected red, green and blue from 0 to 1"):
        sitdist.load(exported, background=background)


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="module 'sitdist' has no attribute 'lode'"):
        _ = sitdist.lode


def test_a_calibrated_run_and_its_export_give_every_estimate_bars_and_trust(tiny_run, pictures, tmp_path, monkeypatch):
    from sitdist.inference.calibration import CalibrateOptions, calibrate
    from sitdist.inference.export import export_run

    for module in ("sitdist.inference.calibration", "sitdist.flow.error_bars"):
        monkeypatch.setattr(f"{module}.FEWEST", 12)  # views of the tiny dataset's test split
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    assert sitdist.load(run).estimate(pictures).trust is None
    calibrate(run, CalibrateOptions("test"))
    flow = sitdist.load(run)
    estimate = flow.estimate(pictures)
    assert estimate.trust.shape == estimate.rotation_std_deg.shape == estimate.translation_std.shape == (8,)
    assert ((estimate.trust > 0) & (estimate.trust <= 1)).all()
    assert (estimate.rotation_bars_deg[:, 0] <= estimate.rotation_bars_deg[:, 1]).all()
    export_run(run, tmp_path / "export")
    again = sitdist.load(tmp_path / "export").estimate(pictures)
    assert torch.equal(again.trust, estimate.trust)
    assert torch.equal(again.translation_bars, estimate.translation_bars)
    assert flow.estimate(pictures, options=EstimateOptions("euler", 3)).trust is None
