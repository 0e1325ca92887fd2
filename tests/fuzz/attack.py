"""Generated bad inputs through the real command line: `python tests/fuzz/attack.py --refused 1000 --seed 0 --jobs 2`.

Every input spoils one thing of a working command: an option, a config, or a file that the command reads. It runs in a
fresh copy of a small tree (a dataset, a run, an export, a scene, photos, an evaluation, and a neighbour's files), in a
process of its own: a fork of a worker that has imported everything, and for one input in 25 a real `python -m sitdist`.

A refusal is exit code 2 and one line on standard error, `sitdist: error: ...`, the last one. Commands that write a
report of what is wrong (doctor, checkpoint list and verify, shards verify) write it besides. What does not count as a
line: progress bars (text that ends in a carriage return, or of the form 3/7 [00:01<00:02, ...]), and log lines, which
begin with `sitdist: ` or `sitdist` and a level; they are counted apart. A violation is

    a traceback, an exit code other than 0 and 2, an end by a signal, more or fewer lines than one;
    no end after SECONDS of computing, or the attempt to use more than MEMORY bytes beyond the imports;
    a refusal after which any file of the tree is changed or removed, or one is left half-written;
    an accepted input that is wrong for certain (a byte of a file whose hash is known, an option that is no number);
    an accepted input after which a file that the command does not own is changed, or JSON that holds NaN;
    an accepted input that gives other answers, where what was spoiled is checked against something that was not;
    a program started, or a connection tried, or a file written outside of the tree.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import inputs

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the package beside these tests, whatever is installed
SECONDS, PATIENCE = 60, 120  # of computing, and by the clock
MEMORY = 3 << 30
REAL_EVERY = 25
REPORTS = (["doctor"], ["checkpoint", "list"], ["checkpoint", "verify"], ["shards", "verify"])
PROGRESS = re.compile(r"\d+(\.\d+)?[kM]?/\d+(\.\d+)?[kM]? \[[^\]]*\]|\d+%\|")
LOG_LINE = re.compile(r"sitdist: (?!error: )|(WARNING|INFO)\b")
NOT_JSON = re.compile(rb"(?<![\w\"'./-])-?(NaN|Infinity)(?![\w\"'])")


@dataclass
class Outcome:
    """What became of one input; `wrong` lists its violations."""

    number: int
    attack: inputs.Attack
    code: int | None = None
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    error: str = ""
    real: bool = False


# ---------------------------------------------------------------------------------------------------------- running it


def snapshot(tree: Path) -> dict[str, str]:
    """What lies in the tree: hashes of files, targets of links."""
    found = {}
    for folder, folders, files in os.walk(tree):
        for name in (*folders, *files):
            path = Path(folder, name)
            key = os.fsencode(path.relative_to(tree)).decode("utf-8", "backslashreplace")
            if path.is_symlink():
                found[key] = f"link to {os.readlink(path)}"
            elif path.is_file():
                found[key] = inputs.sha256(path)
            else:
                found[key] = "folder" if path.is_dir() else "special"
    return found


def environment(tree: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HOME": str(tree / "home"), "HF_HUB_OFFLINE": "1"}
    return kept | quiet | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tree / "home")}


def run_forked(words: inputs.Command, tree: Path, logs: Path) -> tuple[int | None, float]:
    """The command in a fork of this process; its exit code (negative: a signal's; None: it did not end), seconds."""
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(words, tree, logs)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code: int | None = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGXCPU else code, time.monotonic() - begun
        if time.monotonic() - begun > PATIENCE:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None, time.monotonic() - begun
        time.sleep(0.005)


def _child(words: inputs.Command, tree: Path, logs: Path) -> NoReturn:
    code = 99
    try:
        os.setsid()
        os.chdir(tree)
        os.environ.clear()
        os.environ.update(environment(tree))
        tempfile.tempdir = None  # as the environment says
        for number, name in ((0, os.devnull), (1, logs / "out"), (2, logs / "err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
        _limit()
        _watch(tree, logs / "seen")
        from sitdist.cli import main as cli

        try:
            cli.main(words)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _limit() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    used = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
    resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _watch(tree: Path, seen: Path) -> None:
    """Note programs that are started, connections, and files opened for writing outside of the tree."""
    note = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    inside = (str(tree), "/dev/", "/proc/", str(logs_of(tree)))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            if arguments[0] == "uname":  # Python's own module platform
                return
            os.write(note, f"started {arguments[0]!r:.80}\n".encode())
        elif event == "socket.connect" and not isinstance(arguments[1], str | bytes):
            os.write(note, f"connected to {arguments[1]!r:.80}\n".encode())
        elif event == "open" and isinstance(arguments[0], str | bytes) and isinstance(arguments[2], int):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not path.startswith(inside):
                os.write(note, f"wrote {path!r:.80}\n".encode())

    sys.addaudithook(hook)


def logs_of(tree: Path) -> Path:
    return tree.with_name(f"{tree.name}-logs")


def run_real(words: inputs.Command, tree: Path, logs: Path) -> tuple[int | None, float]:
    """The command as a user starts it."""
    begun = time.monotonic()
    with (logs / "out").open("wb") as out, (logs / "err").open("wb") as err:
        arguments = [os.fsencode(word) for word in (sys.executable, "-m", "sitdist", *words)]
        try:
            done = subprocess.run(
                arguments, cwd=tree, env=environment(tree), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                timeout=PATIENCE, check=False,
            )  # fmt: skip
            code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            code = None
    return code, time.monotonic() - begun


def attempt(
    number: int, seed: int, template: Path, folder: Path, keep: bool = False, real: bool | None = None
) -> Outcome:
    """Make input `number` of a seed, run it in a fresh copy of the tree, and judge what happened."""
    random = Random(f"{seed}:{number}")
    tree, names = folder / f"tree-{number}", list(inputs.AREAS)
    shutil.copytree(template, tree, symlinks=True)
    logs = logs_of(tree)
    logs.mkdir(exist_ok=True)
    attack = inputs.AREAS[names[number % len(names)]](random, tree)
    outcome = Outcome(number, attack, real=number % REAL_EVERY == 0 if real is None else real)
    outcome.real |= any("cuda" in word for word in attack.arguments)  # torch refuses it in a fork
    start = run_real if outcome.real else run_forked
    before = snapshot(tree)
    outcome.code, outcome.seconds = start(attack.arguments, tree, logs)
    judge(outcome, attack.arguments, attack.certain, before, tree, logs)
    if (
        outcome.code == 0
        and attack.same
        and answers(attack.command, tree) != reference(attack.command, template, folder)
    ):
        outcome.wrong.append("accepted, with other answers than before anything was spoiled")
    if outcome.code == 0 and attack.then is not None and not outcome.wrong:
        accepted, outcome.code = outcome.error, None
        before = snapshot(tree)
        outcome.code, seconds = start(attack.then, tree, logs)
        outcome.seconds += seconds
        judge(outcome, attack.then, False, before, tree, logs)
        if outcome.code == 2:
            outcome.wrong.append(f"{' '.join(attack.arguments[:2])} accepts what `{' '.join(attack.then)}` refuses")
        outcome.error = outcome.error or accepted
    if keep:
        print(f"kept: {tree} and {logs}", file=sys.stderr)
    else:
        shutil.rmtree(tree)
        shutil.rmtree(logs)
    return outcome


def answers(command: str, tree: Path) -> dict[str, str]:
    """Hashes of what a command answered, where it is known where that is."""
    where = inputs.ANSWERS.get(command, "nowhere")
    path = logs_of(tree) / "out" if where == "printed" else tree / where
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {file.name: inputs.sha256(file) for file in files if file.is_file()}


REFERENCES: dict[str, dict[str, str]] = {}


def reference(command: str, template: Path, folder: Path) -> dict[str, str]:
    """What a command answers on the tree as it was made."""
    if command not in REFERENCES:
        tree = folder / "reference"
        shutil.copytree(template, tree, symlinks=True)
        logs_of(tree).mkdir()
        run_forked(inputs.COMMANDS[command], tree, logs_of(tree))
        REFERENCES[command] = answers(command, tree)
        shutil.rmtree(tree)
        shutil.rmtree(logs_of(tree))
    return REFERENCES[command]


def judge(
    outcome: Outcome, words: inputs.Command, certain: bool, before: dict[str, str], tree: Path, logs: Path
) -> None:
    """Add to `outcome.wrong` whatever the module's text calls a violation."""
    wrong, attack = outcome.wrong, outcome.attack
    out, err = ((logs / name).read_bytes().decode("utf-8", "backslashreplace") for name in ("out", "err"))
    lines, outcome.logged = sorted_lines(err)
    errors = [line for line in lines if line.startswith("sitdist: error: ")]
    reports = any(words[: len(report)] == report for report in REPORTS)
    outcome.error = errors[-1] if errors else blame(err)
    after = snapshot(tree)
    gone = [name for name in before if after.get(name) != before[name]]
    new = [name for name in after if name not in before and not name.startswith("home")]
    if outcome.code is None:
        wrong.append("hang")
    elif outcome.code not in (0, 2):
        wrong.append(f"exit code {outcome.code}")
    if "Traceback (most recent call last)" in err + out:
        wrong.append("traceback")
    elif outcome.code == 2 and not is_one_line(lines, errors, reports):
        wrong.append(f"{len(lines)} lines, {len(errors)} of them errors")
    if outcome.code == 0 and errors:
        wrong.append("an error, and exit code 0")
    if outcome.code == 2:
        wrong += [f"changed {name}" for name in gone]
        outcome.left = [name for name in new if after[name] != "folder"]
        wrong += [f"left {name}" for name in new if ".tmp" in name or ".sitdist-" in name]
    elif outcome.code == 0:
        name = next((name for name, given in inputs.COMMANDS.items() if given == words), attack.command)
        owned = inputs.OWNS.get(name, ())
        wrong += [f"changed {name}" for name in gone if not name.startswith(owned or ("\x00",)) and name not in new]
        wrong += [f"{name} holds NaN" for name in new if name.endswith((".json", ".jsonl")) and nan_in(tree / name)]
        if out.lstrip().startswith("{") and NOT_JSON.search(out.encode()):
            wrong.append("prints NaN as JSON")
        if certain:
            wrong.append("accepted")
    if (logs / "seen").exists():
        wrong += sorted(set((logs / "seen").read_text("utf-8", "backslashreplace").splitlines()))
        (logs / "seen").unlink()


def is_one_line(lines: list[str], errors: list[str], reports: bool) -> bool:
    """Whether there is one error, the last line and the only one; a report's lines may come before, or in its place."""
    if reports:
        return errors == (lines[-1:] if errors else [])
    return len(lines) == len(errors) == 1


def blame(err: str) -> str:
    """The last lines of standard error; of a traceback the place in the package, and the exception."""
    frames = re.findall(r'sitdist/([\w/]+\.py)", line (\d+), in (\w+)', err)
    where = "{}:{} {}: ".format(*frames[-1]) if frames else ""
    return where + err.strip().split("\n")[-1][-300:]


def nan_in(path: Path) -> bool:
    return path.is_file() and NOT_JSON.search(path.read_bytes()) is not None


def sorted_lines(err: str) -> tuple[list[str], list[str]]:
    """The lines that count, and those that are logged; progress bars are neither."""
    counted, logged = [], []
    for line in err.split("\n"):
        shown = [part for part in line.split("\r") if part.strip() and not PROGRESS.search(part)]
        for part in shown if "\r" in line and PROGRESS.search(line) else [line] if shown else []:
            (logged if LOG_LINE.match(part) else counted).append(part)
    return counted, logged


# --------------------------------------------------------------------------------------------------------------- rounds


def import_everything() -> None:
    """What the commands import, once, so that a fork has it; single-threaded, so that a fork is whole."""
    os.environ.update({"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""})
    os.environ["HF_HUB_OFFLINE"] = "1"
    import importlib
    import pkgutil

    import torch

    import sitdist

    torch.set_num_threads(1)
    names = ("torch._dynamo", "torch.utils.tensorboard", "torchmetrics.functional.image", "matplotlib.pyplot")
    for name in (*names, "diffusers.models.autoencoders.autoencoder_kl", "torchvision.utils", "torchdiffeq", "fsspec"):
        importlib.import_module(name)
    for module in pkgutil.walk_packages(sitdist.__path__, "sitdist."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def worker(own: int, options: argparse.Namespace, template: Path, folder: Path) -> None:
    """Attempt every jobs-th input until enough are refused; a line of JSON each in a file."""
    names, refused = list(inputs.AREAS), 0
    numbers = (n for n in itertools.count(options.first) if not options.areas or names[n % len(names)] in options.areas)
    folder.mkdir()
    with (folder / "outcomes.jsonl").open("w") as file:
        for number in itertools.islice(numbers, own, None, options.jobs):
            outcome = attempt(number, options.seed, template, folder)
            refused += outcome.code == 2 and not outcome.wrong
            file.write(json.dumps(asdict(outcome)) + "\n")
            file.flush()
            if outcome.wrong:
                print(describe(asdict(outcome)), file=sys.stderr, flush=True)
            if refused >= options.refused / options.jobs:
                return


def describe(outcome: dict[str, Any]) -> str:
    attack = outcome["attack"]
    words = " ".join(word if len(word) < 60 else word[:57] + "..." for word in attack["arguments"])
    return (
        f"--only {outcome['number']}: {attack['area']}: {attack['change'][:150]!r}: `sitdist {words}`: "
        f"{'; '.join(outcome['wrong'])[:400]}: {outcome['error'][-300:]!r}"
    )


def table(outcomes: list[dict[str, Any]]) -> str:
    """Counts by area: inputs, refused as promised, accepted, violations; refusals that log, or leave new files."""
    lines = [f"{'area':<12} {'inputs':>7} {'refused':>8} {'accepted':>9} {'violations':>11} {'logged':>7} {'left':>5}"]
    for area in (*inputs.AREAS, "all"):
        found = [each for each in outcomes if area in ("all", each["attack"]["area"])]
        refused = [each for each in found if each["code"] == 2 and not each["wrong"]]
        counts = (
            *(len(found), len(refused), sum(each["code"] == 0 and not each["wrong"] for each in found)),
            *(sum(bool(each["wrong"]) for each in found), sum(bool(each["logged"]) for each in refused)),
            sum(bool(each["left"]) for each in refused),
        )
        lines.append("{:<12} {:>7} {:>8} {:>9} {:>11} {:>7} {:>5}".format(area, *counts))
    real = sum(each["real"] for each in outcomes)
    return "\n".join(lines) + f"\n{real} of them as processes of their own, the others as forks of a worker\n"


def main(arguments: list[str] | None = None) -> int:
    """Attack until `--refused` inputs were refused as promised; the exit code says whether there was a violation."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--refused", type=int, default=1000, help="go on until so many were refused as promised")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, help="attempt this input alone, keep its tree and show what happened")
    parser.add_argument("--areas", nargs="+", choices=[*inputs.AREAS], help="attack these areas (default: all)")
    parser.add_argument("--report", type=Path, help="file for all outcomes as JSON lines")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="attack-") as temporary:
        folder = Path(temporary)
        import_everything()
        made = os.waitpid(_fork(lambda: inputs.make_tree(folder / "template", folder / "made")), 0)[1]
        assert made == 0, f"the tree cannot be made: {(folder / 'made').read_text()[-3000:]}"
        if options.only is not None:
            kept = Path(tempfile.mkdtemp(prefix="attack-kept-"))
            outcome = attempt(options.only, options.seed, folder / "template", kept, keep=True)
            print(describe(asdict(outcome)), outcome, sep="\n")
            return int(bool(outcome.wrong))
        template, own_folders = folder / "template", [folder / f"worker-{own}" for own in range(options.jobs)]
        starts = [partial(worker, own, options, template, each) for own, each in enumerate(own_folders)]
        for pid in [_fork(start) for start in starts]:
            assert os.waitpid(pid, 0)[1] == 0, "a worker has failed"
        outcomes = [outcome for each in own_folders for outcome in _read(each)]
    outcomes.sort(key=lambda each: each["number"])
    if options.report:
        options.report.write_text("".join(json.dumps(each) + "\n" for each in outcomes))
    print(table(outcomes), end="")
    wrong = [each for each in outcomes if each["wrong"]]
    for each in wrong:
        print(describe(each))
    return int(bool(wrong))


def _read(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / "outcomes.jsonl").open() as file:
        yield from map(json.loads, file)


def _fork(function: Callable[[], None]) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


if __name__ == "__main__":
    sys.exit(main())
