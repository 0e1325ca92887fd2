"""Everything that reads what strangers give, as functions of bytes: for the property tests, and for atheris.

What each promises of any bytes: a result, or a SitdistError of one line with fewer than LONGEST characters (before
those that steer a terminal are escaped); within SECONDS and MEMORY; and no file is changed.
"""

from __future__ import annotations

import io
import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import inputs
import numpy as np
import spoil

from sitdist.errors import DataError, SitdistError, one_line

LONGEST = 600
SECONDS = 20
MEMORY = 1 << 30


@dataclass(frozen=True)
class Target:
    """A reader: good contents of the file that it reads, how they are spoiled, how they are put there and read."""

    name: str
    seeds: tuple[bytes, ...]
    spoil: Callable[[Random, bytes], tuple[bytes, str]]
    put: Callable[[bytes], object]
    read: Callable[[], object]
    folder: Path

    def attempt(self, data: bytes, quick: bool = False) -> str:
        """Read these bytes; '' or the refusal. Asserts what is promised; `quick`: but for the time and the files."""
        self.put(data)
        before = {} if quick else contents(self.folder)
        refusal = ""
        with limited(not quick):
            try:
                self.read()
            except SitdistError as error:
                refusal = str(error)
        if refusal:
            assert len(refusal) < LONGEST, f"{len(refusal)} characters: {refusal[:300]!r}"
            assert one_line(refusal).isprintable()
        assert quick or contents(self.folder) == before, "a file was changed"
        return refusal


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def limited(clock: bool = True) -> Iterator[None]:
    """Within `with`: MemoryError for more than MEMORY, and with `clock` TimeoutError after SECONDS."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    if clock:
        handler, before = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        if clock:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, *before)  # pytest-timeout's
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def make_targets(folder: Path, run: Path) -> list[Target]:
    """All targets, each with a folder of its own in `folder`; `run` is copied."""
    made = [
        *_yaml_targets(folder),
        *_dataset_targets(folder),
        *_run_targets(folder, run),
        *_camera_targets(folder),
        *_evaluation_targets(folder),
    ]
    for target in made:
        target.folder.mkdir(parents=True, exist_ok=True)
    return made


# ------------------------------------------------------------------------------------------------- configs and recipes


def _text(change: Callable[[Random, str], tuple[str, str]]) -> Callable[[Random, bytes], tuple[bytes, str]]:
    def spoiled(random: Random, data: bytes) -> tuple[bytes, str]:
        if random.randrange(10) == 0:
            return spoil.data_bytes(random, data), "bytes"
        changed, what = change(random, data.decode("utf-8", "surrogateescape"))
        return changed.encode("utf-8", "surrogatepass"), what

    return spoiled


def _yaml_targets(folder: Path) -> list[Target]:
    from sitdist.config.experiment import Config
    from sitdist.config.load import load_yaml, set_key
    from sitdist.config.recipe import Recipe
    from sitdist.io.json_file import parse_json

    made = []
    recipes = (inputs.RECIPE, inputs.PHOTO_RECIPE, inputs.NPZ_RECIPE)
    for name, schema, texts in (("config", Config, (inputs.CONFIG,)), ("recipe", Recipe, recipes)):
        path = folder / name / f"{name}.yaml"
        seeds = tuple(text.encode() for text in texts)
        read = lambda schema=schema, path=path: load_yaml(schema, path)  # noqa: E731
        made.append(
            Target(name, seeds, _text(spoil.yaml_text), lambda data, path=path: put(path, data), read, path.parent)
        )
    path = folder / "set" / "config.yaml"
    put(path, inputs.CONFIG.encode())
    given: list[str] = []

    def hold(data: bytes) -> None:
        given[:] = [data.decode("utf-8", "surrogateescape").replace("\x00", "")]

    keys = inputs.keys_of(inputs.CONFIG)
    settings = tuple(f"{key}=1".encode() for key in ("train.steps", "flow.sigma", "evaluate.seed"))

    def spoiled(random: Random, data: bytes) -> tuple[bytes, str]:
        bad = random.choice(spoil.YAML_VALUES) if random.randrange(2) else str(spoil.value(random))
        word = f"{random.choice(keys)}={bad}"
        return (word if random.randrange(4) else spoil.text(random, word)).encode("utf-8", "surrogatepass"), word[:60]

    def read_set() -> None:
        set_key({}, given[0])
        load_yaml(Config, path, given)

    made.append(Target("set", settings, spoiled, hold, read_set, path.parent))
    where = folder / "json" / "values.json"
    seeds = (b'{"a": [1, 2.5, null, {"b": "c"}]}',)
    read_json = lambda: parse_json(where.read_bytes(), "values.json", "write it again")  # noqa: E731
    made.append(Target("json", seeds, spoil.json_bytes, lambda data: put(where, data), read_json, where.parent))
    return made


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------------------ datasets


def _dataset_targets(folder: Path) -> list[Target]:
    """A manifest; and an index and a tar of a dataset whose manifest holds the hashes of whatever they are."""
    from sitdist.build.writer import build
    from sitdist.config.load import parse
    from sitdist.config.recipe import Recipe
    from sitdist.dataset.manifest import read_manifest
    from sitdist.dataset.verify import verify

    copy, path = folder / "dataset", folder / "manifest" / "manifest.json"
    codec = {"kind": "pca", "patch": 4, "fit_views": 6}
    splits = {"train": {"kind": "scene", "views": 6, "supersample": 1}}
    build(
        parse(Recipe, {"name": "six", "image_size": 16, "codec": codec, "val_views": 0, "splits": splits}, "six"), copy
    )
    seeds = ((copy / "manifest.json").read_bytes(),)
    manifest = Target(
        "manifest", seeds, spoil.json_bytes, lambda data: put(path, data), lambda: read_manifest(path), path.parent
    )
    tar = copy / "train" / "00000.tar"
    index = tar.with_suffix(".index.npz")

    def read() -> None:
        for problem in verify(copy):
            raise DataError(problem)

    made = [manifest]
    for name, file in (("index", index), ("tar", tar)):
        good = {path: path.read_bytes() for path in (tar, index)}

        def write(data: bytes, file: Path = file, good: dict[Path, bytes] = good) -> None:
            for path, content in good.items():
                put(path, data if path == file else content)
            with suppress(ValueError, KeyError, OSError, EOFError):
                if file == tar:
                    inputs.sign_index(tar)
            inputs.sign_dataset(copy)

        change = _index if name == "index" else lambda random, data: (spoil.data_bytes(random, data), "bytes")
        made.append(Target(name, (good[file],), change, write, read, copy))
    return made


def _index(random: Random, data: bytes) -> tuple[bytes, str]:
    with np.load(io.BytesIO(data)) as loaded:
        return spoil.arrays(random, {name: loaded[name] for name in loaded.files})


# ---------------------------------------------------------------------------------------------------- runs and exports


def _run_targets(folder: Path, run: Path) -> list[Target]:
    """The files of a checkpoint; the card and the weights of an export, which holds the hash of whatever they are."""
    from sitdist.inference.export import export_run, load_exported
    from sitdist.io.ownership import check_ours, mark
    from sitdist.runs.checkpoint import read_checkpoint

    source = sorted((run / "checkpoints").glob("step_*"))[-1]
    made = []
    for name in ("manifest.json", "state.json", "ema.safetensors"):
        copy = folder / f"checkpoint-{name}" / source.name
        shutil.copytree(source, copy)

        def write(data: bytes, path: Path = copy / name) -> None:
            put(path, data)
            if path.name != "manifest.json":
                inputs.sign_checkpoint(path.parent)

        change = spoil.safetensors if name.endswith("safetensors") else spoil.json_bytes
        good = ((copy / name).read_bytes(),)
        made.append(Target(f"checkpoint {name}", good, change, write, lambda copy=copy: read_checkpoint(copy), copy))
    for name in ("config.json", "model.safetensors"):
        copy = folder / f"export-{name}"
        export_run(run, copy)
        sign = name == "model.safetensors"

        def write(data: bytes, path: Path = copy / name, sign: bool = sign) -> None:
            put(path, data)
            if sign:
                inputs.sign_export(path.parent)

        change = spoil.safetensors if sign else spoil.json_bytes
        good = ((copy / name).read_bytes(),)
        made.append(Target(f"export {name}", good, change, write, lambda copy=copy: load_exported(copy), copy))
    owned = folder / "owned"
    owned.mkdir(parents=True)
    mark(owned, "run")
    path = owned / "sitdist.json"
    made.append(
        Target(
            "mark",
            (path.read_bytes(),),
            spoil.json_bytes,
            lambda data: put(path, data),
            lambda: check_ours(owned, "run"),
            owned,
        )
    )
    return made


# --------------------------------------------------------------------------------------------- cameras, pictures, scene


def _camera_targets(folder: Path) -> list[Target]:
    from sitdist.build.sources import open_source
    from sitdist.config.recipe import NpzSource, TransformsSource
    from sitdist.io.colmap import read_model
    from sitdist.io.images import to_pixels
    from sitdist.io.pose_files import read_poses
    from sitdist.scene.photos import read_photos

    values = camera_files(folder / "source")
    made = []
    for name in ("poses.npy", "poses.npz", "transforms.json", "path.json"):
        path = folder / f"poses-{name}" / name
        change = {".npy": _npy, ".npz": _index}.get(path.suffix, spoil.json_bytes)
        made.append(
            Target(
                f"poses {name}",
                (values[name],),
                change,
                lambda data, path=path: put(path, data),
                lambda path=path: read_poses(path),
                path.parent,
            )
        )
    for name in ("cameras.txt", "images.txt"):
        copy = folder / f"colmap-{name}"
        for each in ("cameras.txt", "images.txt", "points3D.txt"):
            put(copy / each, values[each])
        made.append(
            Target(
                f"colmap {name}",
                (values[name],),
                _text(spoil.colmap_text),
                lambda data, path=copy / name: put(path, data),
                lambda copy=copy: read_model(copy),
                copy,
            )
        )
    copy = folder / "photos"
    for name in ("0.png", "1.png"):
        put(copy / name, values[name])

    def read_transforms() -> None:
        with suppress(SitdistError):
            source = open_source(TransformsSource(kind="transforms", path=str(copy)), 16)
            source.images(range(len(source)))
        read_photos(copy)

    made.append(
        Target(
            "transforms",
            (values["transforms.json"],),
            spoil.json_bytes,
            lambda data: put(copy / "transforms.json", data),
            read_transforms,
            copy,
        )
    )
    archive = folder / "npz" / "photos.npz"

    def read_npz() -> None:
        with suppress(SitdistError):
            source = open_source(NpzSource(kind="npz", paths=[str(archive)]), 16)
            source.images(range(len(source)))
        read_photos(archive)

    made.append(
        Target("photos.npz", (values["photos.npz"],), _index, lambda data: put(archive, data), read_npz, archive.parent)
    )
    picture = folder / "picture" / "picture.png"

    def read_picture() -> None:
        with suppress(SitdistError):
            to_pixels(str(picture), "picture.png")
        put(folder / "posed" / "0.png", picture.read_bytes())
        read_photos(folder / "posed")

    for name in ("1.png", "transforms.json"):
        put(folder / "posed" / name, values[name])
    made.append(
        Target(
            "picture",
            (values["0.png"], *(data for data, _ in spoil.FOREIGN)),
            lambda random, data: spoil.picture(random, values["0.png"]),
            lambda data: put(picture, data),
            read_picture,
            picture.parent,
        )
    )
    return [*made, *_scene_targets(folder)]


def _npy(random: Random, data: bytes) -> tuple[bytes, str]:
    return spoil.array(random, np.load(io.BytesIO(data)))


def camera_files(folder: Path) -> dict[str, bytes]:
    """Two posed pictures in every format that we read, by name."""
    import torch
    from PIL import Image

    from sitdist.geometry.camera import Intrinsics, look_at
    from sitdist.io.pose_files import PosedPicture, write_poses

    poses = look_at(torch.tensor([[4.0, 0.0, 1.0], [0.0, -4.0, 1.0]], dtype=torch.float64))
    camera = Intrinsics(20.0, 20.0, 8.0, 8.0, 16, 16)
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")
    posed = [PosedPicture(folder / f"{number}.png", pose, camera, {}) for number, pose in enumerate(poses)]
    write_poses(posed, "transforms", folder / "transforms.json")
    write_poses(posed, "colmap", folder / "colmap")
    np.save(folder / "poses.npy", poses.numpy())
    np.savez(folder / "poses.npz", poses=poses.numpy())
    np.savez(folder / "photos.npz", images=pixels, poses=poses.numpy(), focal=np.float64(20.0))
    views = [{"camera_to_world": pose.flatten().tolist(), "fov": 40.0, "aspect": 1.0} for pose in poses]
    path = {"camera_type": "perspective", "render_height": 16, "render_width": 16, "camera_path": views, "fps": 24}
    (folder / "path.json").write_text(json.dumps(path))
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _scene_targets(folder: Path) -> list[Target]:
    """The description and the field of a scene, whose hash is that of whatever it is; one picture of it is rendered."""
    import torch

    from sitdist.geometry.camera import Intrinsics, look_at
    from sitdist.geometry.similarity import Similarity
    from sitdist.scene.grid import VoxelField
    from sitdist.scene.store import Scene, load_scene, save_scene

    values = torch.full((4, 3, 3, 3), 10.0)
    field = VoxelField(values, torch.tensor([[-1.0] * 3, [1.0] * 3]), torch.ones(3), 5.0)
    field.find_empty()
    pose = look_at(torch.tensor([[4.0, 0.0, 1.0]], dtype=torch.float64))
    camera = Intrinsics(4.0, 4.0, 2.0, 2.0, 4, 4)
    made = []
    for name in ("scene.json", "field.safetensors"):
        copy = folder / f"scene-{name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        save_scene(Scene(field, Similarity.identity(), "capture"), copy)

        def write(data: bytes, path: Path = copy / name) -> None:
            put(path, data)
            if path.name != "scene.json":
                inputs.sign_scene(path.parent)

        def read(copy: Path = copy) -> None:
            picture = load_scene(copy).render(pose, camera)
            assert bool(picture.isfinite().all()), "a picture that is not finite"

        change = spoil.json_bytes if name == "scene.json" else spoil.safetensors
        made.append(Target(f"scene {name}", ((copy / name).read_bytes(),), change, write, read, copy))
    return made


# ---------------------------------------------------------------------------------------------------------- evaluation


class Numbers:
    """Two jobs of two records each, as the evaluation's producers have them."""

    plan = {"seed": 1}  # noqa: RUF012

    def __init__(self, out: Path) -> None:
        from pydantic import TypeAdapter

        self.out, self.record = out, TypeAdapter(dict[str, str | float])

    def tasks(self) -> list[Any]:
        from sitdist.evaluate.tasks import Task

        return [Task(f"job_{number}", (f"v{number}a", f"v{number}b"), 2) for number in range(2)]

    def measure(self, task: Any) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        pictures = np.zeros((2, 2, 2, 3), np.uint8)
        records = [{"key": key, "value": 1.0} for key in task.keys]
        return records, {"key": np.array(task.keys), "true": pictures}

    def finish(self, records: Any, arrays: Any) -> None:
        """Nothing is made of them."""


class _Alone:
    is_main_process = False


def _evaluation_targets(folder: Path) -> list[Target]:
    """The records and the pictures of a unit, as they are merged."""
    from sitdist.evaluate.tasks import do_tasks, merge, prepare

    made = []
    for name in ("job_0.jsonl", "job_0.npz"):
        producer = Numbers(folder / f"unit-{name}")
        do_tasks([producer], [prepare(producer)], _Alone())  # type: ignore[arg-type, list-item]
        path = producer.out / "units" / name
        change = _index if path.suffix == ".npz" else spoil.lines
        read = lambda producer=producer: merge(producer)  # noqa: E731
        write = lambda data, path=path: put(path, data)  # noqa: E731
        made.append(Target(f"unit {path.suffix}", (path.read_bytes(),), change, write, read, producer.out))
    return made
