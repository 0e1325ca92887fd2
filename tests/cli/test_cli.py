"""A user's mistake is one line on stderr and exit code 2, and leaves nothing half-written."""

import argparse
import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
import yaml

from sitdist.build import shard as shard_module
from sitdist.cli import main as cli
from sitdist.config.experiment import EvaluateConfig
from sitdist.dataset import info as info_module
from sitdist.errors import RunInterrupted

RECIPE = {
    "name": "small",
    "image_size": 8,
    "codec": {"kind": "pca", "fit_views": 4},
    "val_views": 1,
    "splits": {"train": {"kind": "scene", "views": 5, "supersample": 1}},
}
CONFIG = {
    "name": "tiny",
    "data": "nowhere",
    "model": {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2},
    "train": {"steps": 10, "global_batch": 8},
}


def write(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "sitdist: the following arguments are required: COMMAND"),
        (["trian"], "sitdist: unknown 'trian'; did you mean 'train'?"),
        (["shards", "build", "r.yaml"], "sitdist shards build: the following arguments are required: --out"),
        (["shards", "build", "r", "--out", "x", "--sett=1"], "unknown option '--sett=1'; did you mean '--set'?"),
        (["codec", "fit", "r", "--out", "x", "--batch", "ten"], "argument --batch: 'ten' is not a whole number"),
        (["eval", "run", "--radii", "7:1"], "argument --radii: '7:1' is no range of whole radii; write smaller:larger"),
        (["eval", "run", "--estimator", "eular"], "unknown 'eular'; did you mean 'euler'?"),
    ],
)
def test_a_wrong_command_line_names_the_word_and_the_remedy(refused, arguments, message):
    assert message in refused(*arguments)


def test_interruptions_have_exit_codes_of_their_own(monkeypatch, capsys):
    for error, code in ((KeyboardInterrupt(), 130), (RunInterrupted("saved; run again with --resume"), 75)):

        def stop(*_, error=error):
            raise error

        monkeypatch.setattr(info_module, "info", stop)
        assert cli.run(["shards", "info", "x"]) == code
        assert capsys.readouterr().err.count("\n") == 1


def commands(parser, words=()):
    """Every command of a parser that does something, with its words."""
    inner = [action for action in parser.complete()._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield words, parser
    for action in inner:
        for name, command in action.choices.items():
            yield from commands(command, (*words, name))


def least(parser):
    """The least that a command has to be given, by its actions; what it names is not there."""
    groups = [group for group in parser._mutually_exclusive_groups if group.required]
    one_of = [group._group_actions[0] for group in groups]
    given = {}
    for action in parser._actions:
        if action.required or action in one_of or not action.option_strings or action.dest == "model":
            value = "nowhere" if action.type is None or action.metavar in ("FILE", "A,B") else "1"
            given[action] = next(iter(action.choices)) if action.choices else value
            if action.dest in ("out", "recipe", "config", "dataset", "run", "photos", "source", "runs", "evaluation"):
                given[action] = "nowhere"
    return given


PARSER = cli.make_parser()
COMMANDS = list(commands(PARSER))
ABSURD = ["", "nan", "-1", "9" * 5000, "a\nb\x1b[31m", "\udcff", "x" * 300]


@pytest.mark.parametrize(("words", "parser"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_no_value_of_any_option_is_more_than_one_line(words, parser, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(cli, "make_parser", lambda: PARSER)
    monkeypatch.chdir(tmp_path)
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.nargs == 0:
            continue
        for value in ABSURD:
            given = least(parser) | {action: value}
            line = [each for action, each in given.items() if not action.option_strings]
            for option, each in given.items():
                if option.option_strings:
                    many = option.nargs if isinstance(option.nargs, int) else 1
                    line += [f"{option.option_strings[-1]}={each}"] if many == 1 else [option.option_strings[-1]]
                    line += [each] * many if many > 1 else []
            code, printed = cli.run([*words, *line]), capfd.readouterr()
            if words == ("doctor",) and printed.out:  # its report is its answer
                assert code == 2
                continue
            assert (code, printed.out) == (2, ""), line
            assert printed.err.startswith("sitdist: error: "), line
            assert printed.err.count("\n") == 1, line
            assert printed.err.rstrip("\n").isprintable(), line
            assert len(printed.err) < 2100, line
    assert not list(tmp_path.iterdir())


OF_THE_CONFIG = [(action, words, parser) for words, parser in COMMANDS for action in parser._actions]
OF_THE_CONFIG = [
    (action, words, parser)
    for action, words, parser in OF_THE_CONFIG
    if words[0] in ("eval", "calibrate", "pose", "render") and "the run's config" in (action.help or "")
]


def test_options_of_the_config_take_what_the_config_takes():
    """Choices and bounds of an option are those of its key, so the two refuse the same values."""
    assert {"guidance", "zooms"} <= {option.dest for option, *_ in OF_THE_CONFIG}
    for option, words, parser in OF_THE_CONFIG:
        for value in ("0", "1", "-1", "1000001", "10000000000", "svd", "euler", "exact", "dopri5"):
            key = float(value) if option.type and value.lstrip("-").isdigit() else value
            key = int(key) if option.metavar == "N" and isinstance(key, float) else key
            wanted = allows(option.dest, [key] if option.nargs else key)
            assert accepts(parser, option, value) == wanted, (words, option.dest, value)


def accepts(parser, option, value):
    try:
        parser._check_value(option, parser._get_value(option, value))
    except argparse.ArgumentError:
        return False
    return True


def allows(key, value):
    try:
        EvaluateConfig(**{key: value})
    except ValueError:
        return False
    return True


def fail_with(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(info_module, "info", fail)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/file"), "/a/file: Permission denied; name a place you"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), "File name too long; check the path"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free space"),
        (MemoryError(), "not enough memory; make smaller what is done at once"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0"), "Tried to allocate 20 GiB"),
    ],
)
def test_what_the_system_refuses_is_one_line_with_the_remedy(refused, monkeypatch, error, message):
    fail_with(monkeypatch, error)
    assert message in refused("shards", "info", "x")


@pytest.mark.parametrize("allocate", [lambda: torch.empty(10**15), lambda: np.empty(10**15)])
def test_an_allocation_that_cannot_be_is_one_line(refused, monkeypatch, allocate):
    monkeypatch.setattr(info_module, "info", lambda *_: allocate())
    assert refused("shards", "info", "x").startswith("not enough memory")


def recurse():
    return recurse()


@pytest.mark.parametrize(
    ("fail", "name"),
    [
        (lambda: {}["a\nkey"], "KeyError"),
        (recurse, "RecursionError"),
        (lambda: (_ for _ in ()).throw(ConnectionResetError(errno.ECONNRESET, "reset")), "ConnectionResetError"),
    ],
)
def test_what_nobody_expected_is_one_line_and_a_traceback_that_only_its_owner_reads(
    monkeypatch, tmp_path, capsys, fail, name
):
    monkeypatch.setattr(info_module, "info", lambda *_: fail())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli.run(["shards", "info", "x"]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith(f"sitdist: error: {name}: ")
    assert "open an issue" in printed.err
    (saved,) = tmp_path.iterdir()
    assert printed.err.rstrip().endswith(str(saved))
    assert saved.stat().st_mode & 0o777 == 0o600
    assert f"\n{name}" in saved.read_text()
    assert "in _info" in saved.read_text()
    monkeypatch.setenv("SITDIST_TRACEBACK", "1")
    assert cli.run(["shards", "info", "x"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert cli.run(["shards", "info", "x"]) == 1
    assert "so it was not saved" in capsys.readouterr().err


def test_what_a_launcher_says_is_checked(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert refused("shards", "info", "x").startswith("rank ") is False
    assert "WORLD_SIZE = 'two': not a whole number" in refused("shards", "info", "x")


def process(*arguments, buffered=True, **options):
    """A real process of the command line; its exit code and what it said on stderr."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    command = [sys.executable, "-m", "sitdist", *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, env=variables, check=False, **options)
    return done.returncode, done.stderr.decode()


@pytest.mark.distributed
def test_a_reader_that_leaves_ends_a_command_without_a_word(tiny_dataset):
    info = ["shards", "info", str(tiny_dataset)]
    for arguments, buffered in ((["shards", "cameras", "--help"], True), (info, True), (info, False)):
        reader, writer = os.pipe()
        os.close(reader)
        assert process(*arguments, stdout=writer, buffered=buffered) == (141, ""), arguments
        os.close(writer)
    with open("/dev/full", "w") as full:
        code, errors = process("--version", stdout=full)
    assert code == 2
    assert re.fullmatch(r"sitdist: error: .*No space left on device; free space[^\n]*\n", errors)
    assert process("--version", stdout=None, preexec_fn=lambda: os.close(1)) == (0, "")


@pytest.mark.distributed
def test_names_that_are_no_text_are_escaped_on_both_streams(tiny_dataset, tmp_path):
    name = os.fsencode(tmp_path) + b"/a\nb\xff\x1b[31m"
    code, errors = process("shards", "info", name, stdout=subprocess.DEVNULL)
    assert code == 2
    assert re.fullmatch(r"sitdist: error: \S+/a\\nb\\udcff\\x1b\[31m: no dataset[^\n]*\n", errors)
    shutil.copytree(os.fsencode(tiny_dataset), name)
    with (tmp_path / "printed").open("wb") as out:
        recipe = write(tmp_path / "recipe.yaml", RECIPE)
        assert process("shards", "cameras", recipe, "--split", "train", "--out", tmp_path / "x\ny", stdout=out)[0] == 0
        assert process("shards", "info", name, stdout=out)[0] == 0
    first, *_ = (tmp_path / "printed").read_text().splitlines()
    assert first == f"{tmp_path}/x\\ny: 4 cameras of train"


# ----------------------------------------------------------------------------------------------------------- shards


def test_a_dataset_is_built_described_and_verified(tmp_path, capsys):
    recipe, out = write(tmp_path / "recipe.yaml", RECIPE), tmp_path / "out"
    assert cli.run(["shards", "build", str(recipe), "--out", str(out), "--set", "samples_per_shard=3"]) == 0
    built = capsys.readouterr().out
    assert built.startswith("small: 8x8 pixels, latents 4x2x2, codec pca")
    assert "train: 4 views" in built
    assert "2 shards" in built
    assert cli.run(["shards", "info", str(out)]) == 0
    assert capsys.readouterr().out == built
    assert cli.run(["shards", "verify", str(out)]) == 0
    assert capsys.readouterr().out == built + "verified: every sample and every hash is right\n"


def missing_views(folder):
    return RECIPE | {"splits": {"train": {"kind": "npz", "paths": [str(folder / "nowhere")]}}}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lambda _: RECIPE | {"image_sise": 8}, "recipe.yaml: unknown key 'image_sise'; did you mean 'image_size'?"),
        (lambda _: RECIPE | {"val_views": 5}, "val_views 5 leaves none of the 5 training views to train on"),
        (missing_views, "nowhere: no such file or folder; set the recipe's paths to your posed pictures"),
    ],
)
def test_views_that_cannot_be_used_are_named_before_anything_is_written(tmp_path, refused, recipe, message):
    path = write(tmp_path / "recipe.yaml", recipe(tmp_path))
    assert message in refused("shards", "build", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(path, samples):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shard_module, "_write_tar", full)
    recipe = write(tmp_path / "recipe.yaml", RECIPE)
    assert cli.run(["shards", "build", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (  # after the progress bar's line
        f"sitdist: error: {tmp_path}/out/train/00000.tar: cannot be written (No space left on device); free space or "
        "name a folder you may write to, then run the same command again"
    )
    assert not list((tmp_path / "out").rglob("*.t*"))


# ------------------------------------------------------------------------------------------------------- too large


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["shards", "build", "RECIPE"], ["splits.train.views=1000000000"], "the cameras of 1,000,000,000 views: about"),
        (["codec", "fit", "RECIPE", "--channels", "100000", "100000"], [], "fitting a codec of 2,000,000 M weights"),
    ],
)
def test_too_large_a_request_is_refused_with_what_it_needs(tmp_path, capsys, arguments, changes, message):
    recipe, out = write(tmp_path / "recipe.yaml", RECIPE), tmp_path / "out"
    line = [str(recipe) if word == "RECIPE" else word for word in arguments]
    code = cli.run([*line, "--out", str(out), *(f"--set={change}" for change in changes)])
    told = [each for each in capsys.readouterr().err.splitlines() if each.startswith("sitdist: error: ")]
    assert (code, len(told)) == (2, 1)
    assert message in told[0]
    assert re.search(r"about [\d,.]+ GB of memory, and [\d,.]+ are free; ", told[0])
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.hidden_size=65536", "model.num_heads=16", "model.depth=1000"], "a model of 77,3"),
        (["model.hidden_size=256", "model.depth=4", "train.global_batch=1000000"], "with 1000000 samples at a time"),
    ],
)
def test_training_that_cannot_have_room_is_refused_with_what_it_needs(tmp_path, refused, tiny_yaml, changes, message):
    line = refused("train", tiny_yaml, "--out", tmp_path / "run", *(f"--set={change}" for change in changes))
    assert message in line
    assert re.search(r"about [\d,.]+ GB of memory, and [\d,.]+ are free; ", line)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------- training


def test_a_wrong_config_is_refused_before_a_run_is_begun(tmp_path, refused):
    config, run = write(tmp_path / "config.yaml", CONFIG), tmp_path / "run"
    message = refused("train", config, "--out", run, "--set", "train.stpes=3")
    assert message == f"{config}: unknown key 'train.stpes'; did you mean 'steps'?"
    message = refused("train", tmp_path / "nowhere.yaml", "--out", run)
    assert (
        message
        == f"{tmp_path / 'nowhere.yaml'}: cannot be read (No such file or directory); give the path of a YAML config"
    )
    message = refused("train", config, "--out", run)
    assert message.startswith("nowhere: no dataset: manifest.json is missing; make one with")
    assert not run.exists()


def test_a_warning_of_a_command_that_shows_no_log_is_one_line_that_names_us():
    warn = "import logging, sitdist.cli.outcome as o; o.prepare_output(); logging.getLogger('x').warning('a\\nb')"
    done = subprocess.run([sys.executable, "-c", warn], capture_output=True, text=True, check=True)
    assert done.stderr == "sitdist: a\\nb\n"
