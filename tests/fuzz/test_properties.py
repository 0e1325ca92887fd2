"""Whatever the bytes: a result or one line, in bounded time and memory, and no file changed; and what is written comes
back. Inputs are drawn by hypothesis: a few of the same ones in every fast run, many new ones in the slow run.
"""

import csv
import io
import json

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, note, settings
from hypothesis import strategies as st
from targets import LONGEST, Target, make_targets

from sitdist.config.experiment import Config
from sitdist.config.load import dump_yaml, load_yaml, parse, set_key
from sitdist.config.recipe import Recipe
from sitdist.dataset.manifest import read_manifest
from sitdist.errors import ConfigError, SitdistError, one_line
from sitdist.geometry.camera import Intrinsics
from sitdist.geometry.packing import PoseStatistics
from sitdist.geometry.similarity import Similarity
from sitdist.inference.preprocess import Preprocess
from sitdist.io.colmap import read_model
from sitdist.io.pose_files import PosedPicture, read_poses, write_poses

NAMES = (
    *("config", "recipe", "set", "json", "manifest", "index", "tar", "mark", "transforms", "photos.npz", "picture"),
    *(f"checkpoint {name}" for name in ("manifest.json", "state.json", "ema.safetensors")),
    *("export config.json", "export model.safetensors", "scene scene.json", "scene field.safetensors"),
    *(f"poses {name}" for name in ("poses.npy", "poses.npz", "transforms.json")),
    *("colmap cameras.txt", "colmap images.txt", "unit .jsonl", "unit .npz"),
)
FEW, MANY = 25, 3000
ALWAYS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
budgets = pytest.mark.parametrize("inputs", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


def drawn(inputs: int, times: int = 1) -> settings:
    """So many inputs: the same in every fast run, new ones in every slow run."""
    phases = (Phase.explicit, Phase.generate) if inputs == FEW else tuple(Phase)
    return settings(max_examples=times * inputs, derandomize=inputs == FEW, phases=phases, **ALWAYS)


@pytest.fixture(scope="module")
def targets(tmp_path_factory, tiny_run):
    made = make_targets(tmp_path_factory.mktemp("targets"), tiny_run)
    assert sorted(target.name for target in made) == sorted(NAMES)
    return {target.name: target for target in made}


@budgets
@pytest.mark.parametrize("name", NAMES)
def test_a_reader_gives_a_result_or_one_line(targets, name, inputs):
    target: Target = targets[name]
    refused = set()
    for good in target.seeds:
        refusal = target.attempt(good)
        assert not refusal or name == "picture", f"a good file is refused: {refusal}"

    @drawn(inputs)
    @given(st.randoms(use_true_random=False), st.sampled_from(target.seeds))
    def holds(random, good):
        data, what = target.spoil(random, good)
        note(f"{what}: {data[:300]!r}")
        refused.add(bool(target.attempt(data)))

    @drawn(inputs)
    @given(st.binary(max_size=200))
    @example(b"")
    @example(b"\x00" * 512)
    def holds_for_anything(data):
        target.attempt(data)

    holds()
    holds_for_anything()
    assert True in refused, "nothing was refused: the inputs are not bad"


@pytest.mark.parametrize("override", ["\x1b" * 300, "\x1b" * 300 + ".x=1"])
def test_a_refused_setting_is_short_after_escaping(override):
    with pytest.raises(ConfigError) as raised:
        set_key({"\x1b" * 300: 1}, override)
    assert len(one_line(str(raised.value))) < LONGEST


# ------------------------------------------------------------------------------------------------- there and back again

finite = st.floats(allow_nan=False, allow_infinity=False, width=64)
lengths = st.floats(1e-3, 1e3)
shares = st.floats(0.0, 1.0)
FILE_NAMES = st.text(st.characters(exclude_characters="/\x00", exclude_categories=("Cs",)), min_size=1, max_size=20)


def rotation(angles):
    """A rotation [3, 3] from three numbers."""
    skew = torch.zeros(3, 3, dtype=torch.float64)
    skew[0, 1], skew[0, 2], skew[1, 2] = angles
    return torch.linalg.matrix_exp(skew - skew.T)


@st.composite
def poses(draw):
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = rotation(draw(st.tuples(*[st.floats(-4.0, 4.0)] * 3)))
    pose[:3, 3] = torch.tensor(draw(st.tuples(*[st.floats(-100.0, 100.0)] * 3)), dtype=torch.float64)
    return pose


@st.composite
def cameras(draw):
    width, height = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    fx, fy, cx, cy = (draw(st.floats(low, high)) for low, high in ((0.1, 10), (0.1, 10), (-0.5, 1.5), (-0.5, 1.5)))
    return Intrinsics(width * fx, height * fy, width * cx, height * cy, width, height)


@budgets
def test_posed_pictures_are_read_back_from_every_format(tmp_path, inputs):
    files = iter(range(10**9))

    @drawn(inputs)
    @given(st.lists(st.tuples(poses(), cameras(), FILE_NAMES), min_size=1, max_size=3, unique_by=lambda each: each[2]))
    def holds(given_):
        out = tmp_path / str(next(files))
        out.mkdir()
        assume(all(name not in (".", "..") for *_, name in given_))
        posed = [PosedPicture(out / name, pose, camera, {"trust": 0.5}) for pose, camera, name in given_]
        expected = torch.stack([pose for pose, *_ in given_])
        found: dict[str, torch.Tensor] = {}
        names: dict[str, list[str]] = {}
        for kind in ("jsonl", "csv", "transforms", "tum", "colmap"):
            try:
                write_poses(posed, kind, out / f"{kind}.out")
            except SitdistError:  # a name that the format has no way to say
                assert not (out / f"{kind}.out").exists()
                continue
            if kind == "colmap":
                views = {view.name: view for view in read_model(out / "colmap.out")}
                names[kind] = [name for *_, name in given_]
                assert sorted(views) == sorted(names[kind])
                found[kind] = torch.stack([views[name].camera_to_world for name in names[kind]])
                assert [views[name].intrinsics for name in names[kind]] == [each.intrinsics for each in posed]
            elif kind == "transforms":
                (out / "transforms.json").write_bytes((out / "transforms.out").read_bytes())
                read = read_poses(out / "transforms.json")
                found[kind], names[kind] = read.camera_to_world, file_names(out / "transforms.json")
                assert read.intrinsics == [each.intrinsics for each in posed]
            else:
                found[kind], names[kind] = parsed(kind, (out / f"{kind}.out").read_bytes().decode())
        for kind, tensor in found.items():
            assert names[kind] in ([name for *_, name in given_], []), kind
            assert torch.allclose(tensor, expected, rtol=1e-9, atol=1e-9), kind
        assert {"jsonl", "transforms"} <= set(found)

    holds()


def file_names(path):
    return [frame["file_path"] for frame in json.loads(path.read_text())["frames"]]


def parsed(kind, text):
    """Poses [N, 4, 4] and names as other tools read them."""
    if kind == "jsonl":
        rows = [json.loads(line) for line in text.split("\n")[:-1]]
        return torch.tensor([row["camera_to_world"] for row in rows], dtype=torch.float64), [
            row["file"] for row in rows
        ]
    if kind == "csv":
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        matrices = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)
        for pose, row in zip(matrices, rows, strict=True):
            for i, axis in enumerate(("tx", "ty", "tz")):
                numbers = [float(row[name]) for name in (*(f"r{i}{j}" for j in range(3)), axis)]
                pose[i] = torch.tensor(numbers, dtype=torch.float64)
        return matrices, [row["file"] for row in rows]
    rows = [[float(word) for word in line.split()] for line in text.split("\n") if line and not line.startswith("#")]
    matrices = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)
    for pose, (number, *place, x, y, z, w) in zip(matrices, rows, strict=True):
        assert rows[int(number)][0] == number
        v = torch.tensor([x, y, z], dtype=torch.float64)
        cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
        turned = torch.eye(3, dtype=torch.float64) * (w * w - v @ v) + 2.0 * torch.outer(v, v) + 2.0 * w * cross
        pose[:3, :3] = turned * torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
        pose[:3, 3] = torch.tensor(place, dtype=torch.float64)
    return matrices, []


SCHEMAS = {
    "config": (
        Config,
        st.fixed_dictionaries(
            {
                "name": st.from_regex(r"\A[A-Za-z0-9._-]+\Z"),
                "data": st.text(min_size=1),
                "model": st.fixed_dictionaries({"preset": st.sampled_from(["SiT-S/2", "SiT-XL/8"])}),
                "train": st.fixed_dictionaries(
                    {"steps": st.integers(1), "global_batch": st.integers(1, 2**40)},
                    optional={
                        "ema_decay": st.floats(0, 1, exclude_max=True),
                        "optimizer": st.fixed_dictionaries({"lr": st.floats(0, 1e30, exclude_min=True)}),
                        "loss_spike": st.none() | st.floats(1.0, 1e300, exclude_min=True),
                    },
                ),
            },
            optional={
                "seed": st.integers(0),
                "evaluate": st.fixed_dictionaries(
                    {},
                    optional={
                        "zooms": st.lists(lengths, min_size=1, max_size=4),
                        "background": st.none() | st.lists(shares, min_size=3, max_size=3),
                        "refine": st.none() | st.text(min_size=1),
                    },
                ),
            },
        ),
    ),
    "recipe": (
        Recipe,
        st.fixed_dictionaries(
            {
                "name": st.from_regex(r"\A[A-Za-z0-9._-]+\Z"),
                "image_size": st.integers(1, 64).map(lambda n: 8 * n),
                "codec": st.just({"kind": "pca"})
                | st.fixed_dictionaries({"kind": st.just("vae"), "path": st.text("~é:#", min_size=1)}),
                "splits": st.fixed_dictionaries(
                    {
                        "train": st.fixed_dictionaries(
                            {"kind": st.just("scene"), "views": st.integers(1)},
                            optional={
                                "radius": st.lists(lengths, min_size=2, max_size=2).map(sorted),
                                "fov_range_deg": st.lists(st.floats(2, 160), min_size=2, max_size=2).map(sorted),
                                "elevation_deg": st.lists(st.floats(-90, 90), min_size=2, max_size=2).map(sorted),
                                "scene": st.none() | st.text(min_size=1),
                                "name": st.none() | st.text(min_size=1),
                            },
                        )
                    }
                ),
            }
        ),
    ),
}


@budgets
@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_resolved_reads_back_equal(tmp_path, name, inputs):
    schema, values = SCHEMAS[name]
    path, seen = tmp_path / "resolved.yaml", 0

    @drawn(inputs, times=8)  # many are no valid config
    @given(values)
    def holds(drawn_values):
        nonlocal seen
        try:
            resolved = parse(schema, drawn_values, "drawn")
        except SitdistError:
            return
        seen += 1
        path.write_text(dump_yaml(resolved))
        assert load_yaml(schema, path) == resolved
        assert dump_yaml(load_yaml(schema, path)) == dump_yaml(resolved)

    holds()
    assert seen > inputs // 4


@budgets
def test_framings_and_similarities_come_back_from_json(inputs):
    @drawn(inputs)
    @given(
        st.integers(1, 4096),
        st.none() | st.tuples(*[st.floats(0.1, 1.5)] * 4),
        st.dictionaries(st.integers(0, 9), st.tuples(*[shares] * 3)),
    )
    def framings(size, numbers, colours):
        camera = None if numbers is None else Intrinsics(*(size * each for each in numbers), size, size)
        once = Preprocess.from_dict(json.loads(json.dumps(Preprocess(size, camera, colours).to_dict())))
        assert Preprocess.from_dict(json.loads(json.dumps(once.to_dict()))).backgrounds == once.backgrounds == colours
        assert once.size == size
        assert (once.camera is None) == (camera is None)
        if camera is not None:
            assert once.camera.to_list() == pytest.approx(camera.to_list(), rel=1e-12)

    @drawn(inputs)
    @given(lengths, st.tuples(*[st.floats(-4, 4)] * 3), st.tuples(*[st.floats(-1e6, 1e6)] * 3))
    def similarities(scale, angles, place):
        one = Similarity(scale, rotation(angles), torch.tensor(place, dtype=torch.float64))
        again = Similarity.from_dict(json.loads(json.dumps(one.to_dict())))
        assert again.scale == one.scale
        assert torch.equal(again.rotation, one.rotation)
        assert torch.equal(again.translation, one.translation)

    framings()
    similarities()


@budgets
def test_a_manifest_comes_back(tmp_path, tiny_dataset, inputs):
    manifest = read_manifest(tiny_dataset / "manifest.json")
    path = tmp_path / "manifest.json"

    @drawn(inputs)
    @given(st.integers(1, 10**9), st.text(min_size=1, max_size=30), st.lists(poses(), min_size=2, max_size=4))
    def holds(bytes_, name, cameras_):
        statistics = PoseStatistics.from_poses(torch.stack(cameras_))
        assume(bool(statistics.std.isfinite().all()))
        shard = manifest.splits["train"].shards[0].model_copy(update={"bytes": bytes_})
        train = manifest.splits["train"].model_copy(update={"shards": [shard], "count": shard.count})
        changes = {"splits": {**manifest.splits, "train": train}, "statistics": statistics.to_dict()}
        objects = [each.model_copy(update={"name": name}) for each in manifest.objects]
        changed = manifest.model_copy(update={**changes, "objects": objects})
        path.write_text(changed.model_dump_json(indent=1))
        try:
            again = read_manifest(path)
        except SitdistError:  # counts of objects and splits have to agree
            return
        assert again == changed
        assert torch.equal(PoseStatistics.from_dict(again.statistics).std, statistics.std)

    holds()
