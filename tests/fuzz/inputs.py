"""What is bad: a small tree that every command works on, and generated ways to spoil one thing of it or of a command.

An input is a function of a `random` and a fresh copy of the tree, which it spoils; it says which command reads that.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import spoil

RECIPE = """name: small
image_size: 16
codec: {kind: pca, patch: 4, fit_views: 16}
samples_per_shard: 12
encode_batch: 8
val_views: 4
splits:
  train:
    kind: scene
    views: 28
    radius: [3.0, 5.0]
    supersample: 1
    background: [1.0, 1.0, 1.0]
  test:
    kind: scene
    views: 20
    supersample: 1
    seed: 1
"""
PHOTO_RECIPE = """name: photos
image_size: 16
codec:
  kind: pca
  patch: 4
  fit_views: 4
val_views: 0
splits:
  train:
    kind: transforms
    path: photos
    background: [1.0, 1.0, 1.0]
    label: 0
    name: thing
"""
NPZ_RECIPE = PHOTO_RECIPE.replace("kind: transforms", "kind: npz").replace("path: photos", "paths: [photos.npz]")
NPZ_RECIPE = NPZ_RECIPE.replace("    background: [1.0, 1.0, 1.0]\n", "")
CONFIG = """name: small
data: data
seed: 0
model:
  patch_size: 2
  hidden_size: 16
  depth: 1
  num_heads: 2
  mlp_ratio: 2.0
flow:
  path: linear
  sigma: 0.1
  gain: 1.0
train:
  steps: 2
  global_batch: 4
  precision: fp32
  optimizer:
    lr: 1.0e-2
    betas: [0.9, 0.99]
  schedule: {kind: constant}
  ema_decay: 0.9
  averages: {decays: [0.5], sigma_rels: [0.1, 0.2], snapshot_every: 1}
  log_every: 1
  validation_views: 2
  picture_views: 1
  checkpoint_every: 1
reader:
  workers: 1
  on_bad_sample: stop
evaluate:
  batch: 2
  generator: euler
  generator_steps: 1
  zooms: [0.9, 1.0]
"""
NEIGHBOURS = ("letter.txt", "archive.tar", "other.npz", "notes.json", "deep/er/thesis.tar", ".hidden", "step_1/x")

Command = list[str]
EVAL = ["eval", "run", "--split", "test", "--max-views", "2", "--out", "new"]
SCENE_FIT = ["--out", "new", "--resolutions", "8", "--steps", "60", "--no-view-dependence"]
COMMANDS: dict[str, Command] = {
    "build": ["shards", "build", "recipe.yaml", "--out", "new"],
    "build photos": ["shards", "build", "photo_recipe.yaml", "--out", "new"],
    "build npz": ["shards", "build", "npz_recipe.yaml", "--out", "new"],
    "cameras": ["shards", "cameras", "recipe.yaml", "--split", "test", "--out", "new.json"],
    "verify": ["shards", "verify", "data"],
    "info": ["shards", "info", "data"],
    "codec fit": ["codec", "fit", "recipe.yaml", "--out", "new", "--steps", "1", "--batch", "2", "--views", "8"],
    "scene fit": ["scene", "fit", "photos", *SCENE_FIT],
    "scene fit npz": ["scene", "fit", "photos.npz", *SCENE_FIT],
    "scene fit colmap": ["scene", "fit", "colmap", *SCENE_FIT],
    "scene render": ["scene", "render", "scene", "--out", "new", "--turntable", "1", "--size", "8", "--fov", "30"],
    "train": ["train", "config.yaml", "--out", "new"],
    "resume": ["train", "config.yaml", "--out", "run", "--set", "train.steps=3"],
    "doctor": ["doctor", "config.yaml", "--out", "new"],
    "list": ["checkpoint", "list", "run"],
    "verify checkpoints": ["checkpoint", "verify", "run"],
    "convert": ["checkpoint", "convert", "run", "new.safetensors", "--weights", "model"],
    "eval": EVAL,
    "eval again": ["eval", "run", "--split", "test", "--max-views", "4", "--out", "results"],
    "refine": [*EVAL, "--refine", "scene"],
    "calibrate": ["calibrate", "run", "--split", "test"],
    "likelihood": ["likelihood", "run", "--views", "1", "--probes", "1", "--steps", "1", "--out", "new.csv"],
    "sigma": ["sigma", "data", "--target-deg", "5"],
    "pose": ["pose", "run", "pictures", "--format", "jsonl"],
    "pose of export": ["pose", "export", "pictures", "--out", "new.csv", "--format", "csv"],
    "pose refined": ["pose", "export", "pictures", "--refine", "scene"],
    "render": ["render", "run", "--poses", "poses.npy", "--out", "new", "--generator-steps", "1"],
    "turntable": ["render", "export", "--turntable", "2", "--out", "new.gif", "--radius", "4"],
    "export": ["export", "run", "new"],
    "reconstruct": ["ema", "reconstruct", "run", "--sigma-rel", "0.15", "--out", "new.safetensors"],
    "report": ["report", "results"],
    "compare": ["report", "results", "results2", "--out", "new.html"],
}
# What an accepted command may change besides the files that it makes anew.
OWNS = {
    "resume": ("run/",),
    "eval again": ("results/",),
    "calibrate": ("run/calibration.json",),
    "report": ("results/",),
    "train": ("run/",),
}
# Where the answers of a command are: what it prints, or files, or all files of a folder.
ANSWERS = {
    "pose": "printed",
    "render": "new",
    "likelihood": "new.csv",
    "eval": "new/records.csv",
    "eval again": "results/records.csv",
    "convert": "new.safetensors",
    "reconstruct": "new.safetensors",
    "export": "new/model.safetensors",
}
NEW = ("new", "new.json", "new.safetensors", "new.csv", "new.gif", "new.html")


@dataclass
class Attack:
    """One spoiled input: what is started, what was done; whether to accept it is wrong for certain.

    `then`: a command that has to be accepted too where the first is, such as training on data that verify accepts.
    `same`: where the command is accepted, it has to answer as before anything was spoiled (ANSWERS).
    """

    area: str
    command: str
    arguments: Command
    change: str
    certain: bool = False
    then: Command | None = None
    same: bool = False


# ------------------------------------------------------------------------------------------------------ the seed tree


def make_tree(tree: Path, log: Path) -> None:
    """Everything that the commands read, made by the commands themselves; in a process of its own."""
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    import numpy as np
    import torch
    from PIL import Image

    from sitdist.cli import main as cli
    from sitdist.geometry.camera import look_at

    tree.mkdir(parents=True)
    os.chdir(tree)
    for name, content in (
        ("recipe.yaml", RECIPE),
        ("photo_recipe.yaml", PHOTO_RECIPE),
        ("npz_recipe.yaml", NPZ_RECIPE),
        ("config.yaml", CONFIG),
        *((f"neighbour/{name}", f"do not touch {name}\n" * 50) for name in NEIGHBOURS),
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    for arguments in (
        [*COMMANDS["build"][:-1], "data"],
        ["train", "config.yaml", "--out", "run"],
        ["scene", "render", "built-in", "--out", "photos", "--turntable", "9", "--size", "16", "--supersample", "1"],
        ["scene", "fit", "photos", "--out", "scene", "--keep-frame", *SCENE_FIT[2:]],
        [*EVAL[:-3], "4", "--out", "results"],
        [*EVAL[:-3], "4", "--out", "results2", "--set", "evaluate.generator=heun"],
        ["calibrate", "run", "--split", "test", "--batch", "20"],
        ["export", "run", "export"],
        ["pose", "run", "photos/00000.png", "photos/00001.png", "--format", "colmap", "--out", "colmap"],
    ):
        code = cli.run(arguments)
        assert code == 0, arguments
    Path("photos/turntable.gif").unlink()
    os.rename("photos/00008.png", "photos/extra.png")  # the frame that is left out below
    values = json.loads(Path("photos/transforms.json").read_text())
    values["frames"] = values["frames"][:8]
    Path("photos/transforms.json").write_text(json.dumps(values, indent=1))
    pictures = [np.asarray(Image.open(f"photos/0000{number}.png")) for number in range(8)]
    poses = np.array([frame["transform_matrix"] for frame in values["frames"]])
    np.savez("photos.npz", images=np.stack(pictures), poses=poses, focal=np.float64(values["frames"][0]["fl_x"]))
    poses = look_at(torch.tensor([[4.0, 0.0, 1.0], [0.0, -4.0, 1.0]], dtype=torch.float64)).numpy()
    np.save("poses.npy", poses)
    np.savez("poses.npz", poses=poses)
    Path("colmap/images").mkdir()
    Path("pictures").mkdir()
    for number in range(2):
        shutil.copy(f"photos/0000{number}.png", "colmap/images")
        shutil.copy(f"photos/0000{number}.png", f"pictures/{number}.png")
    Image.open("pictures/0.png").save("pictures/2.jpg")
    Path("home").mkdir()


# ------------------------------------------------------------------------------------------------------- what is bad


def attack_options(random: Random, tree: Path) -> Attack:
    """A command with a word replaced, left out, misspelt or too many."""
    name = random.choice(sorted(COMMANDS))
    words = list(COMMANDS[name])
    options = [place for place, word in enumerate(words) if word.startswith("--")]
    kinds = ("value", "value", "value", "number", "unknown", "cut", "misspelt", "extra", "choice", "device")
    how = random.choice(kinds)
    certain = how in ("unknown", "misspelt", "choice", "device", "number")
    if how == "value" or (how == "misspelt" and not options):
        place = random.randrange(1, len(words))
        words[place] = spoil.bad_word(random)
        certain = False
    elif how == "number":
        flag, *values = random.choice(WRONG_VALUES.get(name, "--no-such-option 1").split(" | ")).split()
        words = [*words, flag, *([random.choice(WRONG_NUMBERS)] if values == ["?"] else values)]
    elif how == "unknown":
        words.insert(random.randrange(1, len(words) + 1), random.choice(("--resmue", "--x", "--out-dir=1", "--\udcff")))
    elif how == "cut":
        words = words[: random.randrange(len(words))]
    elif how == "misspelt":
        place = random.choice(options)
        words[place] = f"--x{words[place][2:]}"
    elif how == "extra":
        words.insert(random.randrange(len(words) + 1), spoil.bad_word(random))
    elif how == "choice":
        words = [*COMMANDS["eval"], random.choice(("--estimator", "--generator", "--readout", "--experiment")), "x"]
    else:
        bad = random.choice(("foo", "cuda:99", "", "meta", "cpu:7x", "mps", "xla", "vulkan"))
        words = [*COMMANDS[random.choice(("pose", "render", "scene fit"))], "--device", bad]
    return Attack("options", name, words, how, certain)


# Options with values that are wrong; ?: any of WRONG_NUMBERS.
WRONG_NUMBERS = ("0", "-1", "nan", "x", "", "1e400", "0x1", "1.5")
WRONG_VALUES = {
    "eval": "--max-views ? | --batch ? | --radii 3:1 | --seed -1 | --seed x",
    "pose": "--batch ? | --intrinsics nan 1 1 1 | --intrinsics inf 20 8 8 | --intrinsics -20 20 8 8 | --label 7"
    " | --intrinsics 1e-300 1e-300 8 8 | --intrinsics 1e300 1e300 8 8 | --intrinsics 20 20 1e30 8 | --label -1"
    f" | --label {'9' * 40}",
    "render": "--fps ? | --batch ? | --label 5 | --label -1 | --seed -1",
    "turntable": "--fps ? | --radius ? | --elevation 91 | --elevation nan",
    "scene render": "--fov ? | --fov 180 | --radius ? | --size ? | --size 1000000 | --supersample 100000"
    " | --background 2 0 0 | --background nan 0 0",
    "scene fit": "--resolutions ? | --resolutions 100000 | --steps ? | --background 1 1 -1",
    "codec fit": "--lr ? | --batch ? | --channels ? | --channels 0 5 | --steps ?",
    "likelihood": "--views ? | --probes ? | --batch ? | --seed x",
    "sigma": "--target-deg ? | --target-deg inf",
    "reconstruct": "--sigma-rel ? | --sigma-rel 5 | --step ?",
    "convert": "--step ? | --step 77 | --weights x",
    "export": "--step ? | --step 99999999999",
}


def spoil_file(random: Random, path: Path, plain: bool = False) -> str:
    """Spoil a file in a way of its kind, or, `plain`, its bytes; what was done."""
    data = path.read_bytes()
    changed, what = spoil.any_bytes(random, data) if plain else spoil.contents(random, path.suffix, data)
    path.write_bytes(changed)
    return f"{path.name}: {what}"


def attack_config(random: Random, tree: Path) -> Attack:
    """A config with a line that is wrong."""
    what = spoil_file(random, tree / "config.yaml")
    name = random.choice(("train", "doctor", "doctor"))
    return Attack("config", name, COMMANDS[name], what)


def keys_of(text: str) -> list[str]:
    """The dotted keys of a config or recipe."""
    import yaml

    found = spoil.places(yaml.safe_load(text))
    return [".".join(path) for path in found if all(isinstance(part, str) for part in path)]


def attack_set(random: Random, tree: Path) -> Attack:
    """A --set whose key or value is wrong."""
    name = random.choice(("doctor", "doctor", "train", "build", "eval", "cameras"))
    key = random.choice([*keys_of(RECIPE if name in ("build", "cameras") else CONFIG), "evaluate.seed", "seed"])
    bad = spoil.value(random, key.rsplit(".", 1)[-1])
    how = random.choice(("yaml", "value", "value", "deeper", "empty", "text", "unknown"))
    word = {
        "yaml": lambda: f"{key}={random.choice(spoil.YAML_VALUES)}",
        "value": lambda: f"{key}={bad if isinstance(bad, str) else json.dumps(bad)}",
        "deeper": lambda: f"{key}.{random.choice(('x', '', '.', '0', 'kind'))}={random.choice(('1', '', 'x'))}",
        "empty": lambda: random.choice(("", "=", "=1", "x", f"{key}", ".=1", "..=", "\n=1", f"{key} = 1")),
        "text": lambda: spoil.text(random, f"{key}=1"),
        "unknown": lambda: f"{key}x=1",
    }[how]()
    word = word.replace("\x00", "\\0").replace("\ud800", "\udcff")[:100_000]  # what a command line can hold
    return Attack("set", name, [*COMMANDS[name], "--set", word], f"{how}: {word[:60]!r}", certain=how == "unknown")


def attack_recipe(random: Random, tree: Path) -> Attack:
    """A recipe with a line that is wrong."""
    name = random.choice(("build", "build photos", "build npz", "cameras", "codec fit"))
    what = spoil_file(random, tree / next(word for word in COMMANDS[name] if word.endswith(".yaml")))
    return Attack("recipe", name, COMMANDS[name], what)


ON_DATA = {
    "verify": COMMANDS["verify"],
    "info": COMMANDS["info"],
    "train": ["train", "config.yaml", "--out", "new", "--set", "train.steps=12"],  # sees every training view
    "eval": [*EVAL[:2], "--split", "test", "--uncalibrated", "--out", "new"],
    "sigma": COMMANDS["sigma"],
    "calibrate": COMMANDS["calibrate"],
    "likelihood": COMMANDS["likelihood"],
}


def attack_dataset(random: Random, tree: Path) -> Attack:
    """A dataset with a wrong manifest, index, tar, codec or folder."""
    data = tree / "data"
    how = random.choice(("manifest", "manifest", "bytes", "index", "index", "member", "member", "folder", "remote"))
    name = random.choice(("verify", "verify", *ON_DATA))
    if how == "manifest":
        what = spoil_file(random, data / "manifest.json")
    elif how == "bytes":  # of a file whose hash the manifest holds
        files = sorted(path for path in data.rglob("*") if path.is_file() and path.parent != data)
        what, name = spoil_file(random, random.choice(files), plain=True), "verify"
    elif how == "index":  # by a stranger who knows how to hash
        what = spoil_file(random, random.choice(sorted(data.rglob("*.index.npz"))))
        sign_dataset(data)
    elif how == "member":
        what = spoil_member(random, random.choice(sorted(data.rglob("*.tar"))))
        sign_dataset(data)
    elif how == "folder":
        what = spoil_folder(random, data)
        name = random.choice(("verify", "train"))
    else:
        values = {"url": random.choice(("file:///etc", "memory://x", "x", 5)), "limit": 0, "cache": "neighbour"}
        (data / "remote.json").write_text(json.dumps(values))
        what = spoil_file(random, data / "remote.json")
    then = ON_DATA[random.choice(("train", "train", "eval", "sigma", "calibrate"))] if name == "verify" else None
    return Attack("dataset", name, ON_DATA[name], f"{how}: {what}", how == "bytes", then)


def spoil_member(random: Random, tar: Path) -> str:
    """Change a member of a tar in place, and the index's checksum with it."""
    import tarfile

    import numpy as np

    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as archive:
        members = [member for member in archive if member.isfile()]
    member = random.choice(members)
    start, stop = member.offset_data, member.offset_data + member.size
    how = random.choice(("value", "value", "bytes", "header", "name", "kind", "picture"))
    if how == "value" and member.name.endswith(".npy"):
        width = 2 if "moments" in member.name else 4 if "packed" in member.name else 8
        bad = random.choice((np.nan, np.inf, 1e4, -1.0)) if width < 8 else random.choice((np.nan, np.inf, 1e300, 2.0))
        array = np.array(bad, dtype={2: "<f2", 4: "<f4", 8: "<f8"}[width]).tobytes()
        place = start + 128 + width * random.randrange((stop - start - 128) // width)
        data[place : place + width] = array
        how = f"{how} {bad}"
    elif how == "header":
        place = start + random.randrange(min(128, member.size))
        data[place] = random.randrange(256)
    elif how in ("name", "kind"):
        block = data[member.offset : member.offset + 512]
        if how == "name":
            block[:100] = random.choice((b"../../x", b"/etc/x", b"000000000.x", b"", b"\xff")).ljust(100, b"\x00")
        else:
            block[156:157] = random.choice((b"1", b"2", b"3", b"5", b"6", b"x", b"L"))
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\x00 " % sum(block)
        data[member.offset : member.offset + 512] = block
    elif how == "picture" and member.name.endswith(".png"):
        changed, _ = spoil.picture(random, bytes(data[start:stop]))
        data[start:stop] = changed[: stop - start].ljust(stop - start, b"\x00")
    else:
        for _ in range(3):
            data[start + random.randrange(member.size)] = random.randrange(256)
    tar.write_bytes(bytes(data))
    sign_index(tar)
    return f"{tar.parent.name}/{tar.name} {member.name} {how}"


def spoil_folder(random: Random, folder: Path) -> str:
    """Remove, empty or replace a file or a folder of a folder."""
    path = random.choice(sorted(folder.rglob("*")))
    how = random.choice(("remove", "empty", "folder", "link", "pipe"))
    if how == "empty" and path.is_file():
        path.write_bytes(b"")
        return f"{path.relative_to(folder.parent)} is empty"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to(random.choice(("/dev/null", "/etc/passwd", "nowhere", path.name, "..")))
    elif how == "pipe":
        os.mkfifo(path)
    return f"{path.relative_to(folder.parent)}: {how}"


def sign_index(tar: Path) -> None:
    """Give the index the checksums of the samples that are in the tar."""
    import zlib

    import numpy as np

    data, path = tar.read_bytes(), tar.with_suffix(".index.npz")
    with np.load(path) as loaded:
        index = {name: loaded[name] for name in loaded.files}
    spans = zip(index["start"].tolist(), index["stop"].tolist(), strict=True)
    index["crc32"] = np.array([zlib.crc32(data[start:stop]) for start, stop in spans], dtype=np.uint32)
    path.write_bytes(spoil.npz({name: spoil.npy(values) for name, values in index.items()}))


def sign_dataset(data: Path) -> None:
    """Give the manifest the sizes and hashes of what is there."""
    path = data / "manifest.json"
    values = json.loads(path.read_bytes())
    for name, split in values["splits"].items():
        for shard in split["shards"]:
            tar = data / name / shard["name"]
            shard |= {"bytes": tar.stat().st_size, "sha256": sha256(tar)}
            shard["index_sha256"] = sha256(tar.with_suffix(".index.npz"))
    values["codec_files"] = {name: sha256(data / "codec" / name) for name in values["codec_files"]}
    path.write_text(json.dumps(values, indent=1))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


ON_RUN = ("eval", "pose", "render", "export", "likelihood", "calibrate", "resume", "convert", "reconstruct")


def attack_run(random: Random, tree: Path) -> Attack:
    """A run with a wrong config, dataset card, codec, calibration, average or folder."""
    run, name = tree / "run", random.choice(ON_RUN)
    how = random.choice(("config", "json", "json", "folder", "tensors", "bytes"))
    if how == "config":
        path = run / "config.yaml"
        original = path.read_text()
        what = spoil_file(random, path)
        # how pictures are rendered and poses read may be changed; what was trained may not
        changed = path.read_text(errors="replace")
        same = changed.partition("evaluate:")[2] == original.partition("evaluate:")[2]
        return Attack("run", name, COMMANDS[name], f"{how}: {what}", same=same)
    if how == "folder":
        what = spoil_folder(random, run)
    else:
        suffix = {"json": "*.json", "tensors": "*.safetensors", "bytes": "*"}[how]
        found = [path for path in run.rglob(suffix) if path.is_file() and "checkpoints" not in path.parts]
        path = random.choice(sorted(found))
        what = f"{path.parent.name}/{spoil_file(random, path, plain=how == 'bytes')}"
    same = "calibration" not in what and "checkpoints" not in what
    return Attack("run", name, COMMANDS[name], f"{how}: {what}", same=same)


def attack_checkpoint(random: Random, tree: Path) -> Attack:
    """A run whose newest checkpoint, the only one, has wrong tensors, a wrong state or a wrong manifest."""
    *older, folder = sorted((tree / "run" / "checkpoints").glob("step_*"))
    for each in older:
        shutil.rmtree(each)
    name = random.choice(("verify checkpoints", "verify checkpoints", "list", *ON_RUN))
    how = random.choice(("bytes", "signed", "signed", "signed", "manifest", "folder"))
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    if how == "folder":
        what = spoil_folder(random, folder)
    elif how == "manifest":
        what = spoil_file(random, folder / "manifest.json")
    else:
        what = spoil_file(random, random.choice(files), plain=how == "bytes")
    if how == "signed":
        sign_checkpoint(folder)
    name = "verify checkpoints" if how == "bytes" else name
    same = how in ("manifest", "folder")
    return Attack("checkpoint", name, COMMANDS[name], f"{how}: {what}", how == "bytes", same=same)


def sign_checkpoint(folder: Path) -> None:
    """Give the manifest of a checkpoint the sizes and hashes of what is there."""
    path = folder / "manifest.json"
    values = json.loads(path.read_bytes())
    for name, entry in values["files"].items():
        entry |= {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    path.write_text(json.dumps(values))


def attack_export(random: Random, tree: Path) -> Attack:
    """A stranger's export with a wrong card, wrong weights or codec."""
    export = tree / "export"
    name = random.choice(("pose of export", "pose of export", "turntable", "pose refined"))
    how = random.choice(("config", "config", "manifest", "model", "model", "codec", "folder", "bytes", "calibration"))
    if how == "folder":
        what = spoil_folder(random, export)
    elif how == "bytes":  # of a file whose hash is known
        what = spoil_file(random, export / "model.safetensors", plain=True)
    else:
        what = spoil_file(random, random.choice(sorted(export.glob("codec/*.*" if how == "codec" else f"{how}.*"))))
    if how in ("model", "codec"):
        sign_export(export)
    return Attack("export", name, COMMANDS[name], f"{how}: {what}", how == "bytes")


def sign_export(export: Path) -> None:
    """Give an export's card and manifest the hashes of what is there, where they can be read."""
    try:
        values = json.loads((export / "config.json").read_bytes())
        manifest = json.loads((export / "manifest.json").read_bytes())
        values["weights_sha256"] = sha256(export / "model.safetensors")
        manifest["codec_files"] = {name: sha256(export / "codec" / name) for name in manifest["codec_files"]}
    except (ValueError, TypeError, KeyError):  # one of the two is what was spoiled
        return
    (export / "config.json").write_text(json.dumps(values))
    (export / "manifest.json").write_text(json.dumps(manifest))


def attack_scene(random: Random, tree: Path) -> Attack:
    """A stranger's scene with a wrong description or field."""
    scene, name = tree / "scene", random.choice(("scene render", "scene render", "pose refined", "refine"))
    how = random.choice(("description", "description", "field", "field", "bytes", "folder"))
    if how == "folder":
        what = spoil_folder(random, scene)
    else:
        path = scene / ("scene.json" if how == "description" else "field.safetensors")
        what = spoil_file(random, path, plain=how == "bytes")
    if how == "field":
        sign_scene(scene)
    return Attack("scene", name, COMMANDS[name], f"{how}: {what}", how == "bytes")


def sign_scene(scene: Path) -> None:
    """Give the description the hash of the field that is there."""
    values = json.loads((scene / "scene.json").read_bytes())
    (scene / "scene.json").write_text(json.dumps(values | {"field_sha256": sha256(scene / "field.safetensors")}))


def attack_pictures(random: Random, tree: Path) -> Attack:
    """A picture of a wrong kind or size, or damaged, for every command that reads pictures."""
    name = random.choice(("pose", "pose of export", "scene fit", "build photos", "scene fit colmap"))
    folders = {"scene fit": "photos", "build photos": "photos", "scene fit colmap": "colmap/images"}
    folder = tree / folders.get(name, "pictures")
    path = random.choice([path for path in sorted(folder.iterdir()) if path.suffix in (".png", ".jpg")][:3])
    what = spoil_file(random, path)
    words = list(COMMANDS[name])
    if name == "pose" and random.random() < 0.3:
        (tree / "masks").mkdir()
        for good in (tree / "pictures").iterdir():
            shutil.copy(tree / "photos" / "00000.png", tree / "masks" / good.with_suffix(".png").name)
        what = f"{what}; a mask {spoil_file(random, tree / 'masks' / '0.png')}"
        words = [*words, "--masks", "masks"]
    certain = what.endswith((": PostScript", ": PDF", ": SVG", ": PSD", ": XBM", ": empty"))
    return Attack("pictures", name, words, what, certain)


def attack_poses(random: Random, tree: Path) -> Attack:
    """Poses for `render` in a file that is wrong."""
    given = random.choice(("poses.npy", "poses.npz", "photos/transforms.json", "colmap"))
    what = spoil_colmap(random, tree) if given == "colmap" else spoil_file(random, tree / given)
    words = ["render", "run", "--poses", given, "--out", "new", "--generator-steps", "1"]
    return Attack("poses", "render", words, what)


def spoil_colmap(random: Random, tree: Path) -> str:
    return spoil_file(random, tree / "colmap" / random.choice(("cameras.txt", "images.txt", "images.txt")))


def attack_photos(random: Random, tree: Path) -> Attack:
    """Posed photos whose transforms.json, COLMAP model or .npz is wrong, to fit a scene or build a dataset from."""
    name = random.choice(("scene fit", "build photos", "scene fit npz", "build npz", "scene fit colmap"))
    if "colmap" in name:
        what = spoil_colmap(random, tree)
    else:
        what = spoil_file(random, tree / ("photos.npz" if "npz" in name else "photos/transforms.json"))
    return Attack("photos", name, COMMANDS[name], what)


def attack_evaluation(random: Random, tree: Path) -> Attack:
    """An evaluation whose units, plan, records or results are wrong, to go on with or to report."""
    name = random.choice(("eval again", "eval again", "report", "compare", "export"))
    folder = tree / "results"
    if name == "export":  # its card shows the run's evaluations
        folder = Path(shutil.move(folder, tree / "run" / "eval" / "results"))
    if name == "eval again":
        for made in ("records.csv", "metrics.json", "report.html"):
            (folder / made).unlink(missing_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".png")
    what = spoil_folder(random, folder) if random.random() < 0.15 else spoil_file(random, random.choice(files))
    return Attack("evaluation", name, COMMANDS[name], what, same=True)


PLACES = ("neighbour", "neighbour/letter.txt", "data", "scene", "export", "photos", "results")


def attack_paths(random: Random, tree: Path) -> Attack:
    """A place to write to that is somebody else's or cannot be, or a thing to read that is of another kind."""
    how = random.choice(("out", "out", "out", "read", "long", "name"))
    writing = sorted(name for name, words in COMMANDS.items() if any(word in NEW for word in words))
    name = random.choice(writing)
    words = list(COMMANDS[name])
    place = next(number for number, word in enumerate(words) if word in NEW)
    if how == "out":
        bad = random.choice((*PLACES, "config.yaml", "."))
        kind = {"train": "run", "doctor": "run", "eval": "results", "refine": "results"}.get(name)
        certain = bad not in ("results", "run") or kind is None
        words[place] = bad
    elif how == "long":
        words[place] = random.choice(("x" * 300, "x/" * 3000 + "x", "neighbour/letter.txt/x", "/proc/x", "/dev/null/x"))
        certain = True
    elif how == "name":
        odd = ("a\nb", "\x1b[31m", "\udcff", " ", "-", "é" * 127, "%s", "new\rsitdist: error: x")
        words[place] = random.choice(odd)
        certain = False
    else:
        name = random.choice(sorted(COMMANDS))
        words = list(COMMANDS[name])
        place = 2 if words[0] in ("shards", "scene", "checkpoint", "codec", "ema") else 1
        bad = random.choice([other for other in (*PLACES, "run", "/dev/null") if other != words[place]])
        words[place] = bad
        certain = bad.startswith(("neighbour", "/dev"))
    certain = certain and name != "doctor"
    return Attack("paths", name, words, f"{how}: {words[place][:40]!r}", certain)


AREAS: dict[str, Callable[[Random, Path], Attack]] = {
    name.removeprefix("attack_"): function for name, function in list(globals().items()) if name.startswith("attack_")
}
