"""`sitdist quickstart PHOTOS --out DIR`: from photos to a measured, exported model, by the other commands in turn."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from sitdist.cli.parser import Command, Parser, check_there, output, positive_number
from sitdist.cli.scene import add_capture
from sitdist.errors import ConfigError

log = logging.getLogger("sitdist")
# How the time is spent: scene, views, training, and everything else.
SHARES = {"scene": 0.15, "views": 0.15, "training": 0.6, "the rest": 0.1}
VIEWS = (500, 30000)
STEPS = (200, 20000)
CONFIG = {
    "name": "quickstart",
    "model": {"patch_size": 4, "hidden_size": 192, "depth": 6, "num_heads": 6},
    "flow": {"sigma": 0.02, "share_at_one": 0.7, "share_at_zero": 0.2, "weight_at_one": 10.0},
    "appearance": {},
    "train": {
        "global_batch": 64,
        "precision": "auto",
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 100},
        "ema_decay": 0.998,
        "log_every": 100,
    },
}


def _options(command: Parser) -> None:
    add_capture(command)
    command.add_argument("--out", type=output, required=True, help="Folder of all results. Run again to continue.")
    command.add_argument("--minutes", type=positive_number, default=45.0, metavar="N", help="About how long to take.")


def _quickstart(options: argparse.Namespace) -> int:
    check_there(options.source)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("quickstart runs in one process; for several, start its commands by a launcher one by one")
    out, begun = options.out, time.monotonic()
    photos, scene, views, trained = out / "photos", out / "photos/scene", out / "views", out / "run"
    plan = ", ".join(f"{name} {share * options.minutes:.0f} min" for name, share in SHARES.items())
    log.info("plan: photos, then %s; the same command continues where it was stopped", plan)

    def step(done: Path, *words: object) -> None:
        """Run a command unless what it makes is there; a failed one ends the quickstart."""
        if done.exists():
            return
        arguments = [str(word) for word in words]
        log.info("[%.1f min] sitdist %s", (time.monotonic() - begun) / 60.0, shlex.join(arguments))
        code = options.main(arguments)
        if code:
            raise _Stopped(code)

    try:
        step(photos, "photos", options.source, "--out", photos, *_capture_words(options))
        step(scene, "scene", "fit", photos / "train.json", "--out", scene)
        count = _kept(out / "views.json", lambda: _number_of_views(photos / "recipe.yaml", options.minutes))
        recipe = ("build", photos / "recipe.yaml", "--set", f"splits.train.views={count}", "--set", "val_views=128")
        step(views / "manifest.json", "shards", *recipe, "--out", views)
        config = out / "config.yaml"
        steps = _kept(out / "steps.json", lambda: _number_of_steps(config, views, options.minutes))
        step(trained / "calibration.json", "train", config, "--set", f"train.steps={steps}", "--out", trained)
        held_out = ("--photos", photos / "test.json") if (photos / "test.json").is_file() else ()
        step(out / "eval/report.html", "eval", trained, *held_out, "--out", out / "eval")
        step(out / "refined/report.html", "eval", trained, *held_out, "--refine", scene, "--out", out / "refined")
        step(out / "robustness/report.html", "eval", trained, "--experiment", "robustness", "--out", out / "robustness")
        step(out / "model", "export", trained, out / "model")
    except _Stopped as stopped:
        return stopped.code
    spent = (time.monotonic() - begun) / 60.0
    log.info("[%.1f min] model: %s, report: %s", spent, out / "model", out / "eval/report.html")
    log.info("next: sitdist pose %s PICTURES --refine %s", out / "model", scene)
    return 0


class _Stopped(Exception):
    def __init__(self, code: int) -> None:
        self.code = code


def _capture_words(options: argparse.Namespace) -> list[object]:
    """The options of `sitdist photos` that were given."""
    reader = Parser(options=add_capture).complete()
    words: list[object] = []
    for action in reader._actions:
        value = getattr(options, action.dest, None)
        if not action.option_strings or action.dest == "help" or value == action.default:
            continue
        words.append(action.option_strings[0])
        words += [] if value is True else value if isinstance(value, list) else [value]
    return words


def _kept(path: Path, choose: Callable[[], int]) -> int:
    """A number that was chosen before, or that is chosen now and kept, so that a later start does the same."""
    if not path.is_file():
        path.write_text(json.dumps(choose()))
    return int(json.loads(path.read_text()))


def _number_of_views(recipe: Path, minutes: float) -> int:
    """How many views are rendered in their share of the time, by the time of a few."""
    import torch

    from sitdist.build.sources import open_source
    from sitdist.config.load import load_yaml
    from sitdist.config.recipe import Recipe

    chosen = load_yaml(Recipe, recipe)
    source = open_source(chosen.splits["train"], chosen.image_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as when views are built, one view a thread
    source.views([0])
    begun = time.perf_counter()
    source.views(range(1, 9))
    seconds = (time.perf_counter() - begun) / 8 / threads
    torch.set_num_threads(threads)
    return _within(VIEWS, SHARES["views"] * 60.0 * minutes / seconds)


def _number_of_steps(config: Path, views: Path, minutes: float) -> int:
    """Write the config, and return how many steps are trained in their share of the time, by the time of a few."""
    from sitdist.config.experiment import Config
    from sitdist.config.load import dump_yaml, parse
    from sitdist.dataset.manifest import load_manifest
    from sitdist.distributed.accelerator import processes
    from sitdist.train.doctor import time_steps

    cameras = load_manifest(views).splits["train"].cameras
    level = cameras is not None and cameras.looks_at_origin and cameras.upright
    values = {**CONFIG, "data": str(views), "evaluate": {"readout": "look_at" if level else "svd"}}
    values["train"] = {**CONFIG["train"], "steps": STEPS[0]}  # type: ignore[dict-item]
    parsed = parse(Config, values, "quickstart")
    config.write_text(dump_yaml(parsed, defaults=False))
    with processes(parsed.train.precision) as (accelerator, ranks):
        seconds, _ = time_steps(parsed, accelerator, ranks)
    return _within(STEPS, SHARES["training"] * 60.0 * minutes / seconds)


def _within(bounds: tuple[int, int], number: float) -> int:
    """The number in whole hundreds, within its bounds."""
    return int(min(max(number // 100 * 100, bounds[0]), bounds[1]))


COMMANDS: list[Command] = [
    ("quickstart", "Go from photos of an object to a measured, exported model.", _options, _quickstart),
]
