"""What single ranks do in tests beside the plain commands; the processes import this file."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from sitdist.build import codec_fit, writer
from sitdist.build import shard as shard_module
from sitdist.build.sources import ViewSource
from sitdist.cli import main as cli
from sitdist.config.load import parse
from sitdist.config.recipe import Recipe
from sitdist.distributed.accelerator import make_accelerator, processes
from sitdist.distributed.ddp import DDP
from sitdist.evaluate import view_evaluator
from sitdist.flow import draws
from sitdist.geometry.camera import Intrinsics, look_at
from sitdist.io import atomic
from sitdist.runs import checkpoint as checkpoints
from sitdist.train import trainer as trainer_module
from sitdist.train.ema import Ema
from sitdist.train.trainer import Trainer
from sitdist.train.validation import Validation


def rank() -> int:
    return int(os.environ["RANK"])


def train_and_record(folder: Path, *arguments: str) -> None:
    """Train, and leave what each step of this rank saw in `folder`."""
    make = trainer_module.make_inputs

    def make_and_record(batch, config, *given):
        inputs = make(batch, config, *given)
        seen = {"keys": batch.keys, "positions": batch.positions, "x0": inputs.x0, "x1": inputs.x1, "t": inputs.t}
        step = int(batch.positions[0]) // config.train.global_batch
        torch.save(seen | {"drop_labels": inputs.drop_labels}, folder / f"step_{step}_rank_{rank()}.pt")
        return inputs

    trainer_module.make_inputs = make_and_record
    cli.main(arguments)


def train_without_sync(*arguments: str) -> None:
    """Train while no process tells the others its gradients."""
    accumulate = DDP.accumulate
    DDP.accumulate = lambda self, is_last: accumulate(self, is_last=False)
    cli.main(arguments)


def train_and_die(checkpoint: int, file: str, *arguments: str) -> None:
    """Train, and get SIGKILL in the middle of writing a file of the n-th checkpoint (from 0) of this process."""
    checkpoints_begun = -1

    def deadly(write: Callable[..., None]) -> Callable[..., None]:
        def write_and_die(*given: Any) -> None:
            nonlocal checkpoints_begun
            path = next(each for each in given if isinstance(each, Path))
            checkpoints_begun += path.name == "model.safetensors"
            write(*given)
            if checkpoints_begun == checkpoint and path.name == file:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return write_and_die

    checkpoints.save_file, checkpoints.write_json = deadly(checkpoints.save_file), deadly(checkpoints.write_json)
    cli.main(arguments)


def train_and_be_told_to_stop(phase: str, *arguments: str) -> None:
    """Train, and get SIGTERM in the middle of the first checkpoint, validation or compiled step of this process."""
    owner: Any
    owner, name = {
        "save": (checkpoints, "save_file"),
        "validation": (Validation, "measure"),
        "compile": (trainer_module, "flow_loss"),
    }[phase]
    function, told = getattr(owner, name), False

    def with_a_signal(*arguments: Any, **options: Any) -> Any:
        nonlocal told
        if not told:
            told = True
            if phase == "compile":  # from beside, as the compiler is at work by then
                Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
            else:
                os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **options)

    setattr(owner, name, with_a_signal)
    cli.main(arguments)


def train_on_a_full_disk(*arguments: str) -> None:
    """Train where no checkpoint can be written."""

    def refuse(*_: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints.save_file = refuse
    cli.main(arguments)


def evaluate_and_wait(go: Path, *arguments: str) -> None:
    """Evaluate; rank 1 stops inside its first unit, which a file beside `go` tells, until `go` is there."""
    measure = view_evaluator.ViewEvaluator.measure

    def measure_and_wait(self, job):
        if rank() == 1:
            go.with_suffix(".waits").touch()
            while not go.exists():
                time.sleep(0.05)
        return measure(self, job)

    view_evaluator.ViewEvaluator.measure = measure_and_wait
    cli.main(arguments)


def with_extra_on(own: int, extra: list[str], *arguments: str) -> None:
    """A command to which one rank alone gets `extra` arguments."""
    cli.main([*arguments, *extra] if rank() == own else arguments)


def train_with_nan_on(own: int, *arguments: str) -> None:
    """Train, and see a latent that is not a number in step 2, on one rank alone."""
    make = trainer_module.make_inputs

    def make_poisoned(batch, config, *given):
        inputs = make(batch, config, *given)
        if rank() == own and int(batch.positions[0]) // config.train.global_batch == 2:
            inputs.x1[3] = torch.nan
            print(batch.keys[3], flush=True)
        return inputs

    trainer_module.make_inputs = make_poisoned
    cli.main(arguments)


def train_failing_on(own: int, where: str, error: Exception, *arguments: str) -> None:
    """Train, and meet an error on one rank alone, in a step or while all begin together."""
    owner: Any = trainer_module if where == "step" else checkpoints
    name = "make_inputs" if where == "step" else "dataset_fingerprint"
    function = getattr(owner, name)

    def fail(*given: Any) -> Any:
        if rank() == own:
            raise error
        return function(*given)

    setattr(owner, name, fail)
    cli.main(arguments)


def train_leaving_out(step: int, *arguments: str) -> None:
    """Train, and call nothing that changes weights, optimizer and their average in one step."""
    accumulate, update, average = Trainer._accumulate_gradients, torch.optim.AdamW.step, Ema.update
    now = -1

    def accumulate_and_remember(self, inputs):
        nonlocal now
        now = self.step
        return accumulate(self, inputs)

    Trainer._accumulate_gradients = accumulate_and_remember
    torch.optim.AdamW.step = lambda *given, **named: None if now == step else update(*given, **named)
    Ema.update = lambda *given: None if now == step else average(*given)
    cli.main(arguments)


def fail_on(own: int, where: str) -> None:
    """Fail on one rank, by a bug, inside a block that all go through together or outside of any."""
    with processes() as (_, ranks):
        if where == "outside" and rank() == own:
            raise RuntimeError("a bug")
        with ranks.raise_together():
            if where == "inside" and rank() == own:
                raise RuntimeError("a bug")


def count_processes(folder: Path) -> None:
    """Leave the number of processes that this one sees."""
    (folder / f"sees_{rank()}").write_text(str(make_accelerator().num_processes))


def be_alone(folder: Path) -> None:
    """Form a group of one, whatever the launcher says, before the command starts."""
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    cli.main(["eval", str(folder)])


def build_and_die(own: int, number: int, *arguments: str) -> None:
    """Build shards, and get SIGKILL on one rank in the middle of the n-th tar (from 0) that it writes."""
    write, begun = shard_module._write_tar, -1

    def write_and_die(path, samples):
        nonlocal begun
        begun += 1
        write(path, samples)
        if rank() == own and begun == number:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    shard_module._write_tar = write_and_die
    cli.main(arguments)


def fit_without_sync(*arguments: str) -> None:
    """Fit a codec while no process tells the others its gradients."""
    run_steps = codec_fit.CodecFit.run_steps

    def run_alone(self, views):
        prepare = self.accelerator.prepare

        def prepare_alone(model, optimizer):
            model, optimizer = prepare(model, optimizer)
            model.require_backward_grad_sync = False
            return model, optimizer

        self.accelerator.prepare = prepare_alone
        run_steps(self, views)

    codec_fit.CodecFit.run_steps = run_alone
    cli.main(arguments)


def fit_with_nan_on(own: int, *arguments: str) -> None:
    """Fit a codec, and see pictures that are not numbers in step 2, on one rank alone."""
    batch = codec_fit.CodecFit.batch

    def poisoned(self, views, step):
        images, noise = batch(self, views, step)
        return (images * torch.nan if rank() == own and step == 2 else images), noise

    codec_fit.CodecFit.batch = poisoned
    cli.main(arguments)


def fit_and_die(where: str, *arguments: str) -> None:
    """Fit a codec, and get SIGKILL after the first views, in step 2, or in the middle of writing the folder."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    write_at, batch = codec_fit._write_at, codec_fit.CodecFit.batch
    if where == "views":
        codec_fit._write_at = lambda *given: (write_at(*given), die())
    elif where == "step":
        codec_fit.CodecFit.batch = lambda self, views, step: die() if step == 2 else batch(self, views, step)
    else:
        atomic.flush_file = die
    cli.main(arguments)


class Grey(ViewSource):
    """Pictures without anything on them, from cameras that all differ."""

    def __init__(self, views: int, size: int) -> None:
        self.camera_to_world = look_at(draws.uniform(0, "places", torch.arange(views), 3) + 1.0)
        self.labels, self._size = torch.zeros(views, dtype=torch.int64), size

    def intrinsics(self, index):
        return Intrinsics.from_fov(40.0, self._size, self._size)

    def views(self, indices):
        grey = torch.full((len(indices), 3, self._size, self._size), 0.5)
        return torch.cat([grey, torch.zeros_like(grey[:, :1])], dim=1)

    def background(self, index):
        return None

    def fingerprint(self):
        return "grey"


def build_large(recipe: dict, size: int, out: Path) -> None:
    """Build a dataset whose pictures take `size` bytes each, and leave this process's largest resident size there."""
    writer.open_source = lambda config, image_size: Grey(config.views, image_size)
    shard_module._png = lambda image: os.urandom(size)
    writer.build(parse(Recipe, recipe, "large"), out)
    (out / "peak").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def doctor_to_file(folder: Path, config: str) -> None:
    """What the doctor tells each rank."""
    from sitdist.train.doctor import doctor

    (folder / f"doctor_{rank()}.txt").write_text(doctor(Path(config), [], None, folder / "run").report())


def start_together(gate: Path, own: int, count: int, *arguments: str) -> None:
    """A command, once `count` processes stand at the gate, where each leaves its number and its process id."""
    unfinished = gate / f".{own}"
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(gate / str(own))
    while len(list(gate.glob("[0-9]*"))) < count:
        time.sleep(0.0005)
    cli.main(arguments)
