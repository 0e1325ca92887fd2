"""Everything that reads what strangers give, as functions of bytes, for the property tests.

What each promises of any bytes: a result, or a SitdistError whose line has fewer than LONGEST characters as a terminal
shows it; within SECONDS and MEMORY; and no file is changed.
"""

from __future__ import annotations

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
Change = Callable[[Random, bytes], tuple[bytes, str]]


@dataclass(frozen=True)
class Target:
    """A reader: good contents of the file that it reads, how they are spoiled, how they are put there and read."""

    name: str
    seeds: tuple[bytes, ...]
    spoil: Change
    put: Callable[[bytes], object]
    read: Callable[[], object]
    folder: Path

    def attempt(self, data: bytes) -> str:
        """Read these bytes; '' or the refusal. Asserts what is promised."""
        self.put(data)
        before = contents(self.folder)
        refusal = ""
        with limited():
            try:
                self.read()
            except SitdistError as error:
                refusal = str(error)
        line = one_line(refusal)
        assert len(line) < LONGEST, f"{len(line)} characters: {line[:300]!r}"
        assert line.isprintable()
        assert contents(self.folder) == before, "a file was changed"
        return refusal


def file_target(
    name: str,
    path: Path,
    read: Callable[[], object],
    sign: Callable[[Path], object] | None = None,
    seeds: tuple[bytes, ...] = (),
) -> Target:
    """A reader of the file `path`, which is good as it is there, or as `seeds` are; spoiled in a way of its kind.

    `sign` gives the folder of the file, afterwards, the hashes of whatever it holds.
    """

    def write(data: bytes) -> None:
        put(path, data)
        if sign is not None:
            sign(path.parent)

    change = spoil.BY_SUFFIX[path.suffix]
    return Target(name, seeds or (path.read_bytes(),), change, write, read, path.parent)


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def limited() -> Iterator[None]:
    """Raise MemoryError for more than MEMORY, and TimeoutError after SECONDS."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    handler, before = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)  # pytest-timeout's
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def make_targets(folder: Path, run: Path) -> list[Target]:
    """All targets, each with a folder of its own in `folder`; `run` is copied."""
    made = [
        *_text_targets(folder),
        *_dataset_targets(folder),
        *_run_targets(folder, run),
        *_camera_targets(folder),
        *_scene_targets(folder),
        *_evaluation_targets(folder),
    ]
    for target in made:
        target.folder.mkdir(parents=True, exist_ok=True)
    return made


def _setting(random: Random, data: bytes) -> tuple[bytes, str]:
    bad = random.choice(spoil.YAML_VALUES) if random.randrange(2) else str(spoil.value(random))
    word = f"{random.choice(inputs.keys_of(inputs.CONFIG))}={bad}"
    return (word if random.randrange(4) else spoil.text(random, word)).encode("utf-8", "surrogatepass"), word[:60]


# ---------------------------------------------------------------------------------------------- configs and datasets


def _text_targets(folder: Path) -> Iterator[Target]:
    from sitdist.config.experiment import Config
    from sitdist.config.load import load_yaml, set_key
    from sitdist.config.recipe import Recipe
    from sitdist.io.files import parse_json

    config, recipe, values = folder / "config" / "a.yaml", folder / "recipe" / "a.yaml", folder / "json" / "a.json"
    recipes = tuple(text.encode() for text in (inputs.RECIPE, inputs.PHOTO_RECIPE, inputs.NPZ_RECIPE))
    yield file_target("config", config, lambda: load_yaml(Config, config), seeds=(inputs.CONFIG.encode(),))
    yield file_target("recipe", recipe, lambda: load_yaml(Recipe, recipe), seeds=recipes)
    seeds = (b'{"a": [1, 2.5, null, {"b": "c"}]}',)
    read = lambda: parse_json(values.read_bytes(), "a.json", "write it again")  # noqa: E731
    yield file_target("json", values, read, seeds=seeds)
    path, given = folder / "set" / "config.yaml", [""]
    put(path, inputs.CONFIG.encode())

    def hold(data: bytes) -> None:
        given[0] = data.decode("utf-8", "surrogateescape").replace("\x00", "")

    def read_set() -> None:
        set_key({}, given[0])
        load_yaml(Config, path, given)

    settings = tuple(f"{key}=1".encode() for key in ("train.steps", "flow.sigma", "evaluate.seed"))
    yield Target("set", settings, _setting, hold, read_set, path.parent)


def _dataset_targets(folder: Path) -> Iterator[Target]:
    """A manifest; and an index and a tar of a dataset whose manifest holds the hashes of whatever they are."""
    from sitdist.build.writer import build
    from sitdist.config.load import parse
    from sitdist.config.recipe import Recipe
    from sitdist.dataset.manifest import read_manifest
    from sitdist.dataset.verify import verify

    copy, path = folder / "dataset", folder / "manifest" / "manifest.json"
    codec = {"kind": "pca", "patch": 4, "fit_views": 6}
    splits = {"train": {"kind": "scene", "views": 6, "supersample": 1}}
    recipe = {"name": "six", "image_size": 16, "codec": codec, "val_views": 0, "splits": splits}
    build(parse(Recipe, recipe, "six"), copy)
    put(path, (copy / "manifest.json").read_bytes())
    yield file_target("manifest", path, lambda: read_manifest(path))
    tar = copy / "train" / "00000.tar"
    good = {path: path.read_bytes() for path in (tar, tar.with_suffix(".index.npz"))}

    def read() -> None:
        for problem in verify(copy):
            raise DataError(problem)

    for file in good:

        def write(data: bytes, file: Path = file) -> None:
            for path, content in good.items():
                put(path, data if path == file else content)
            with suppress(ValueError, KeyError, OSError, EOFError):
                if file == tar:
                    inputs.sign_index(tar)
            inputs.sign_dataset(copy)

        change = spoil.BY_SUFFIX.get(file.suffix, spoil.any_bytes)
        yield Target("tar" if file == tar else "index", (good[file],), change, write, read, copy)


# ---------------------------------------------------------------------------------------------------- runs and exports


def _run_targets(folder: Path, run: Path) -> Iterator[Target]:
    """The files of a checkpoint; the card and the weights of an export, which holds the hash of whatever they are."""
    from sitdist.inference.export import export_run, load_exported
    from sitdist.io.ownership import check_ours, mark
    from sitdist.runs.checkpoint import read_checkpoint

    source = sorted((run / "checkpoints").glob("step_*"))[-1]
    for name in ("manifest.json", "state.json", "ema.safetensors"):
        copy = Path(shutil.copytree(source, folder / f"checkpoint-{name}" / source.name))
        sign = None if name == "manifest.json" else inputs.sign_checkpoint
        yield file_target(f"checkpoint {name}", copy / name, lambda copy=copy: read_checkpoint(copy), sign)
    for name, sign in (("config.json", None), ("model.safetensors", inputs.sign_export)):
        copy = folder / f"export-{name}"
        export_run(run, copy)
        yield file_target(f"export {name}", copy / name, lambda copy=copy: load_exported(copy), sign)
    owned = folder / "owned"
    owned.mkdir(parents=True)
    mark(owned, "run")
    yield file_target("mark", owned / "sitdist.json", lambda: check_ours(owned, "run"))


# --------------------------------------------------------------------------------------------- cameras, pictures, scene


def _camera_targets(folder: Path) -> Iterator[Target]:
    from sitdist.build.sources import open_source
    from sitdist.config.recipe import NpzSource, TransformsSource
    from sitdist.io.colmap import read_model
    from sitdist.io.images import to_pixels
    from sitdist.io.pose_files import read_poses
    from sitdist.scene.photos import read_photos

    values = camera_files(folder / "source")
    for name in ("poses.npy", "poses.npz", "transforms.json"):
        path = folder / f"poses-{name}" / name
        read = lambda path=path: read_poses(path)  # noqa: E731
        yield file_target(f"poses {name}", path, read, seeds=(values[name],))
    for name in ("cameras.txt", "images.txt"):
        copy = folder / f"colmap-{name}"
        for each in ("cameras.txt", "images.txt", "points3D.txt"):
            put(copy / each, values[each])
        read = lambda copy=copy: read_model(copy)  # noqa: E731
        yield file_target(f"colmap {name}", copy / name, read)
    photos, archive, posed = folder / "photos", folder / "npz" / "photos.npz", folder / "posed"
    for name in ("0.png", "1.png", "transforms.json"):
        put(photos / name, values[name])
        put(posed / name, values[name])
    sources = {
        photos: TransformsSource(kind="transforms", path=str(photos)),
        archive: NpzSource(kind="npz", paths=[str(archive)]),
    }

    def read_both(path: Path) -> None:
        with suppress(SitdistError):
            source = open_source(sources[path], 16)
            source.images(range(len(source)))
        read_photos(path)

    yield file_target("transforms", photos / "transforms.json", lambda: read_both(photos))
    yield file_target("photos.npz", archive, lambda: read_both(archive), seeds=(values["photos.npz"],))
    picture = folder / "picture" / "picture.png"

    def read_picture() -> None:
        with suppress(SitdistError):
            to_pixels(str(picture), "picture.png")
        put(posed / "0.png", picture.read_bytes())
        read_photos(posed)

    seeds = (values["0.png"], *(data for data, _ in spoil.FOREIGN))
    yield file_target("picture", picture, read_picture, seeds=seeds)


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
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _scene_targets(folder: Path) -> Iterator[Target]:
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
    for name, sign in (("scene.json", None), ("field.safetensors", inputs.sign_scene)):
        copy = folder / f"scene-{name}"
        save_scene(Scene(field, Similarity.identity(), "capture"), copy)

        def read(copy: Path = copy) -> None:
            picture = load_scene(copy).render(pose, camera)
            assert bool(picture.isfinite().all()), "a picture that is not finite"

        yield file_target(f"scene {name}", copy / name, read, sign)


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


def _evaluation_targets(folder: Path) -> Iterator[Target]:
    """The records and the pictures of a unit, as they are merged."""
    from sitdist.evaluate.tasks import do_tasks, merge, prepare

    for name in ("job_0.jsonl", "job_0.npz"):
        producer = Numbers(folder / f"unit-{name}")
        do_tasks([producer], [prepare(producer)], _Alone())  # type: ignore[arg-type, list-item]
        path = producer.out / "units" / name
        made = file_target(f"unit {path.suffix}", path, lambda producer=producer: merge(producer))
        yield Target(made.name, made.seeds, made.spoil, made.put, made.read, producer.out)
