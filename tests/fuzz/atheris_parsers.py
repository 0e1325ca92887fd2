"""A coverage-guided run over everything that reads what strangers give, by atheris (which `pip install atheris` gives).

    python tests/fuzz/atheris_parsers.py --minutes 60

One process fuzzes, with only the package's own code instrumented, the targets of `targets.py`: the first byte of an
input says which. libFuzzer keeps inputs that reach new code; half of its changes are its own, half those of `spoil.py`.
A finding is whatever breaks the promise of `targets.py`; each is shown once, by target, exception and place. It goes on
after findings. At the end: executions, refusals and findings by target, and how many places of the code were reached.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
HANG = 60  # seconds after which libFuzzer ends the run, and leaves the input
EVERY = 5.0  # seconds between two notes of what was found


def fuzz(folder: Path, seconds: int) -> None:
    """Fuzz until the time is over; notes go to folder/notes.json."""
    import atheris
    import torch

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=["sitdist"]):
        import sitdist

        for module in pkgutil.walk_packages(sitdist.__path__, "sitdist."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    from targets import make_targets

    os.chdir(folder / "tree")
    targets = make_targets(folder / "targets", Path("run"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, target in enumerate(targets):
        for place, seed in enumerate(target.seeds):
            (corpus / f"{number}-{place}").write_bytes(bytes([number]) + seed)
    runs: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    found: dict[str, dict[str, Any]] = {}
    last = time.monotonic()

    def one(data: bytes) -> None:
        nonlocal last
        if not data:
            return
        target = targets[data[0] % len(targets)]
        runs[target.name] += 1
        try:
            refused[target.name] += bool(target.attempt(data[1:], quick=True))
        except Exception as error:
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/sitdist/" in frame.filename]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else ""
            key = f"{target.name}: {type(error).__name__} in {where}"
            place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
            shown = base64.b64encode(data[1:4001]).decode()
            entry = found.setdefault(key, {"times": 0, "place": place, "error": str(error)[:200], "input": shown})
            entry["times"] += 1
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            note()

    def note() -> None:
        notes = {"runs": dict(runs), "refused": dict(refused), "found": found}
        (folder / "notes.tmp").write_text(json.dumps(notes))
        (folder / "notes.tmp").rename(folder / "notes.json")

    def change(data: bytes, limit: int, seed: int) -> bytes:
        random = Random(seed)
        if data and random.random() < 0.5:
            target = targets[data[0] % len(targets)]
            try:
                return (data[:1] + target.spoil(random, data[1:])[0])[:limit]
            except Exception:  # what is no longer good enough to be spoiled so
                pass
        return atheris.Mutate(data, limit)

    options = [f"-max_total_time={seconds}", f"-timeout={HANG}", "-rss_limit_mb=0", "-max_len=1000000", "-verbosity=1"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", str(corpus)], one, custom_mutator=change)
    note()
    atheris.Fuzz()


def report(folder: Path, log: str, seconds: float) -> str:
    """What was done and found, by target."""
    notes = json.loads((folder / "notes.json").read_text())
    coverage = re.findall(r"cov: (\d+) ft: (\d+)", log)
    lines = [f"{'target':<28} {'runs':>10} {'refused':>10} {'findings':>9}"]
    for name, runs in sorted(notes["runs"].items()):
        findings = sum(key.startswith(f"{name}: ") for key in notes["found"])
        lines.append(f"{name:<28} {runs:>10,} {notes['refused'].get(name, 0):>10,} {findings:>9}")
    total = sum(notes["runs"].values())
    reached = (
        f"{int(coverage[-1][0]):,} places and {int(coverage[-1][1]):,} features of the package" if coverage else "?"
    )
    lines.append(f"{total:,} runs in {seconds / 60:.1f} minutes; {reached} reached; {len(notes['found'])} findings")
    for key, entry in sorted(notes["found"].items()):
        lines.append(
            f"{key} ({entry['place']}), {entry['times']} times: {entry['error']!r}; input {entry['input'][:400]}"
        )
    lines += [f"libFuzzer ended early: {path.name}, {path}" for path in folder.glob("*-*") if path.is_file()]
    return "\n".join(lines)


def main() -> int:
    """Make the files that are spoiled, fuzz in a process of its own, and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    seconds = max(1, round(60 * options.minutes))
    if options.folder:
        fuzz(options.folder, seconds)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="atheris-"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    make = "import inputs; from pathlib import Path; inputs.make_tree(Path('tree'), Path('made').resolve())"
    where = {**environment, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    subprocess.run([sys.executable, "-c", make], cwd=folder, env=where, check=True)
    begun = time.monotonic()
    command = [sys.executable, __file__, "--in", str(folder), "--minutes", str(options.minutes)]
    done = subprocess.run(command, env=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    log = done.stdout.decode("utf-8", "replace")
    (folder / "log").write_text(log)
    print(report(folder, log, time.monotonic() - begun))
    print(f"corpus and log: {folder}")
    return int(done.returncode != 0 or bool(json.loads((folder / "notes.json").read_text())["found"]))


if __name__ == "__main__":
    sys.exit(main())
