"""A thousand generated bad inputs are refused through the real command line; and the judge of that sees every fault."""

import subprocess
import sys
from pathlib import Path

import attack
import pytest
from attack import Outcome, judge, snapshot, sorted_lines
from inputs import Attack

REFUSED = 1000


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_a_thousand_bad_inputs_are_refused():
    command = [sys.executable, attack.__file__, "--refused", str(REFUSED), "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3500, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]


ERROR = "sitdist: error: x: wrong; repair it\n"
GOOD = {"code": 2, "err": ERROR}


@pytest.mark.parametrize(
    ("what", "happened"),
    [
        ("exit code 1", {"code": 1}),
        ("exit code -11", {"code": -11}),
        ("hang", {"code": None}),
        ("traceback", {"err": "Traceback (most recent call last)\n" + ERROR}),
        ("0 lines, 0 of them errors", {"err": ""}),
        ("2 lines, 2 of them errors", {"err": ERROR + ERROR}),
        ("2 lines, 1 of them errors", {"err": "x: attempt 1 of 5 failed\n" + ERROR}),
        ("2 lines, 1 of them errors", {"err": ERROR + "and more\n"}),
        ("changed letter.txt", {"change": lambda tree: (tree / "letter.txt").write_text("b")}),
        ("changed letter.txt", {"change": lambda tree: (tree / "letter.txt").unlink()}),
        ("changed folder", {"change": lambda tree: (tree / "folder").rmdir()}),
        ("left .sitdist-1.tmp", {"change": lambda tree: (tree / ".sitdist-1.tmp").touch()}),
        ("accepted", {"code": 0, "err": "", "certain": True}),
        ("changed letter.txt", {"code": 0, "err": "", "change": lambda tree: (tree / "letter.txt").write_text("b")}),
        ("new.json holds NaN", {"code": 0, "err": "", "change": lambda tree: (tree / "new.json").write_text("[NaN]")}),
        ("prints NaN as JSON", {"code": 0, "err": "", "out": '{"a": -Infinity}\n'}),
        ("an error, and exit code 0", {"code": 0}),
        ("started 'gs'", {"seen": "started 'gs'\n"}),
    ],
)
def test_every_fault_is_seen(tmp_path, what, happened):
    assert judged(tmp_path / "good", GOOD) == []
    assert judged(tmp_path / "bad", GOOD | happened) == [what]


def judged(folder, happened):
    tree, logs = folder / "tree", folder / "logs"
    (tree / "folder").mkdir(parents=True)
    logs.mkdir()
    (tree / "letter.txt").write_text("a")
    before = snapshot(tree)
    if "change" in happened:
        happened["change"](tree)
    (logs / "out").write_text(happened.get("out", ""))
    (logs / "err").write_text(happened["err"])
    if "seen" in happened:
        (logs / "seen").write_text(happened["seen"])
    outcome = Outcome(0, Attack("options", "info", ["shards", "info", "data"], "x"), happened["code"])
    judge(outcome, outcome.attack.arguments, happened.get("certain", False), before, tree, logs)
    return outcome.wrong


def test_progress_bars_are_no_lines_and_logs_are_counted_apart():
    bar = "\rviews:   0%|          | 0/48 [00:00<?, ?view/s]\rviews: 100%|████| 48/48 [00:00<00:00, 472.53view/s]\n"
    assert sorted_lines(bar + "sitdist: saved run/checkpoints/step_1\n" + ERROR) == (
        [ERROR.strip()],
        ["sitdist: saved run/checkpoints/step_1"],
    )


def test_a_fork_is_judged_as_what_it_does(tmp_path, monkeypatch):
    """Exit codes, output, programs and files of a command that runs in a fork."""
    import sitdist.cli.main

    def run(function):
        monkeypatch.setattr(sitdist.cli.main, "main", lambda words: function())
        tree = tmp_path / "tree"
        logs = attack.logs_of(tree)
        for folder in (tree, logs):
            folder.mkdir(exist_ok=True)
        code, _ = attack.run_forked([], tree, logs)
        seen = (logs / "seen").read_text() if (logs / "seen").exists() else ""
        (logs / "seen").unlink(missing_ok=True)
        return code, (logs / "err").read_text(), seen

    assert run(lambda: sys.exit(2))[0] == 2
    code, err, _ = run(lambda: 1 / 0)
    assert code == 1
    assert "ZeroDivisionError" in err
    assert run(lambda: print("é\udcff", file=sys.stderr)) == (0, "é\\udcff\n", "")
    assert "MemoryError" in run(lambda: bytearray(1 << 40))[1]
    assert "started" in run(lambda: subprocess.run(["true"], check=True))[2]
    outside = tmp_path / "outside.txt"
    assert "wrote" in run(lambda: outside.write_text("x"))[2]
    assert run(lambda: Path("inside.txt").write_text("x"))[2] == ""
    monkeypatch.setattr(attack, "PATIENCE", 0.5)
    assert run(lambda: __import__("time").sleep(30))[0] is None
