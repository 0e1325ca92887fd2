"""A run that is killed at any moment goes on to the bits of an undisturbed one; one asked to stop says so."""

import json
import random
import re
import shutil
import signal
import time

import pytest
import ranks

from sitdist.runs.checkpoint import folder_of, list_checkpoints, read_newest

pytestmark = pytest.mark.distributed

STEPS = 24
SETTINGS = (
    f"train.steps={STEPS}",
    "train.checkpoint_every=3",
    "train.keep_checkpoints=2",
    "train.schedule.kind=cosine",
)


@pytest.fixture(scope="module")
def undisturbed(tiny_yaml, tmp_path_factory):
    """The files of the last checkpoint of a run without incidents on so many processes, and its seconds."""
    done = {}

    def files(world):
        if world not in done:
            folder = tmp_path_factory.mktemp("undisturbed")
            arguments = ["train", tiny_yaml, "--out", folder / "run", *ranks.settings(*SETTINGS)]
            ranks.sitdist(folder, world, *arguments, "--set", "train.steps=1").run(120)  # starts the fork server
            begun = time.monotonic()
            ranks.sitdist(folder, world, *arguments).run()
            done[world] = (everything(folder / "run"), time.monotonic() - begun)
        return done[world]

    return files


def has_lines(run):
    """Whether a step was logged."""
    path = run / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


def everything(run):
    return {path.name: path.read_bytes() for path in sorted(folder_of(run, STEPS).glob("*.safetensors"))}


@pytest.mark.parametrize(
    ("world", "checkpoint", "file"),
    [(1, 0, "model.safetensors"), (1, 4, "manifest.json"), (2, 2, "optimizer.safetensors")],
)
def test_a_run_killed_inside_a_checkpoint_write_goes_on_bit_for_bit(
    train, undisturbed, tmp_path, world, checkpoint, file
):
    from tasks import train_and_die

    run = tmp_path / "run"
    codes = train(world, run, *SETTINGS, task=train_and_die, task_arguments=[checkpoint, file]).wait()
    assert codes[0] == -signal.SIGKILL
    assert any(run.glob(f"checkpoints/.sitdist-*.tmp/{file}"))  # it was cut off inside
    newest = read_newest(run)
    assert (0 if newest is None else newest.step) == 3 * checkpoint
    train(world, run, *SETTINGS).run()
    assert everything(run) == undisturbed(world)[0]
    assert not any(run.glob("checkpoints/.*"))


def run_with_kills(train, run, world, seconds, generator):
    """Start a run again and again, and kill it at a random moment each time, until it is through; how often it died."""
    kills, reached = 0, 0
    while True:
        started = train(world, run, *SETTINGS)
        time.sleep(generator.uniform(0.1, 1.0) * seconds)
        codes = started.kill()
        assert set(codes) <= {0, -signal.SIGKILL}, started.errors()
        found = list_checkpoints(run)
        before, reached = reached, int(found[-1].name.removeprefix("step_")) if found else 0
        assert reached >= before  # nothing that was saved is lost again
        if not any(codes):
            return kills
        kills += 1


def assert_kills_change_nothing(train, undisturbed, folder, world, generator, kills):
    expected, seconds = undisturbed(world)
    died = 0
    while died < kills:
        run = folder / f"after_{died}_kills"
        died += run_with_kills(train, run, world, seconds, generator)
        assert everything(run) == expected
        shutil.rmtree(run)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_at_random_moments_goes_on_bit_for_bit(train, undisturbed, tmp_path, world):
    assert_kills_change_nothing(train, undisturbed, tmp_path, world, random.Random(world), kills=1)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_fifty_kills(train, undisturbed, tmp_path, world):
    assert_kills_change_nothing(train, undisturbed, tmp_path, world, random.Random(10 + world), kills=25)


def test_a_process_that_dies_does_not_leave_the_others_waiting(train, tmp_path):
    run = tmp_path / "run"
    started = train(2, run, "train.steps=100000", "train.checkpoint_every=2")
    started.wait(60, until=lambda: len(list_checkpoints(run)) > 1)
    started.send(signal.SIGKILL, [1])
    codes = started.wait(60, grace=40)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] > 0  # by itself
    assert re.search(r"sitdist: error: rank 1 \(process \d+ on \S+\) ended or no longer answers", started.errors(0))


@pytest.mark.parametrize("told", [[0, 1], [1]])
def test_sigterm_saves_once_and_every_process_says_resume_me(train, tensor_bytes, tmp_path, told):
    run = tmp_path / "run"
    started = train(2, run, "train.steps=100000", "train.log_every=1")
    started.wait(60, until=lambda: has_lines(run))
    started.send(signal.SIGTERM, told)
    assert started.wait(60, grace=20) == [75, 75]
    (saved,) = list_checkpoints(run)
    stopped = read_newest(run).step
    assert saved.name == f"step_{stopped:08d}"
    message = f"sitdist: stopped after step {stopped} of 100000; go on with the same command\n"
    assert started.errors().count("stopped after") == 1
    assert started.errors(0).endswith(message)

    longer = f"train.steps={stopped + 2}"
    train(2, run, longer).run()
    train(2, tmp_path / "whole", longer).run()
    assert tensor_bytes(run, stopped + 2) == tensor_bytes(tmp_path / "whole", stopped + 2)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    ("phase", "world"), [("save", 2), ("validation", 2), pytest.param("compile", 1, marks=pytest.mark.slow)]
)
def test_sigterm_in_any_phase_ends_in_a_whole_checkpoint(train, tensor_bytes, tmp_path, phase, world):
    from tasks import train_and_be_told_to_stop

    run, steps = tmp_path / "run", "train.steps=100000"
    settings = [steps, "train.checkpoint_every=4", "train.validate_every=3", "train.log_every=1"]
    settings += ["train.compile=blocks"] if phase == "compile" else []
    task = {"task": train_and_be_told_to_stop, "task_arguments": [phase]}
    assert train(world, run, *settings, **task).wait(300, grace=60) == [75] * world
    stopped = read_newest(run).step
    assert stopped <= {"save": 4, "validation": 3, "compile": 1}[phase] + 2
    assert not any(run.glob("checkpoints/.*"))
    if phase != "compile":
        longer = [f"train.steps={stopped + 2}", *settings[1:]]
        train(world, run, *longer).run()
        train(world, tmp_path / "whole", *longer).run()
        assert tensor_bytes(run, stopped + 2) == tensor_bytes(tmp_path / "whole", stopped + 2)
