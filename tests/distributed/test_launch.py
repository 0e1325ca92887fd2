"""The files of launch/ start what they say, with the launchers themselves."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from sitdist.cli.main import make_parser
from sitdist.config.experiment import Config
from sitdist.runs.checkpoint import folder_of, list_checkpoints, read_checkpoint, read_newest
from sitdist.train.doctor import backend_of_file

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


@pytest.fixture
def start(tmp_path):
    """Start a command in the project's root, its output in a file; whatever is left of it is killed at the end."""
    started = []

    def run(*command, **variables):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **variables}
        with (tmp_path / "output").open("w") as output:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.distributed
def test_torchrun_starts_two_processes_and_hands_sigterm_on(start, tiny_yaml, tmp_path):
    run = tmp_path / "run"
    options = ["--out", run, "--set", "train.steps=100000", "--set", "train.checkpoint_every=2"]
    process = start(LAUNCH / "torchrun.sh", "train", tiny_yaml, *options, PROCESSES="2", ACCELERATE_USE_CPU="true")
    deadline = time.monotonic() + 150
    while not list_checkpoints(run):
        assert process.poll() is None, (tmp_path / "output").read_text()
        assert time.monotonic() < deadline, (tmp_path / "output").read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    output = (tmp_path / "output").read_text()
    stopped = re.search(r"sitdist: stopped after step (\d+) of 100000", output)
    assert stopped, output
    assert code == 1  # torchrun's own: it keeps the 75 of its processes to itself
    newest = read_newest(run, [])
    assert newest.step == int(stopped[1])
    assert newest.state["world_size"] == 2


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "processes"), [("cpu_1.yaml", 1), ("cpu_2.yaml", 2)])
def test_accelerate_starts_processes_on_the_cpu(start, tiny_yaml, tmp_path, name, processes):
    accelerate = Path(sys.executable).with_name("accelerate")
    launcher = [accelerate, "launch", "--config_file", LAUNCH / name, "-m", "sitdist"]
    options = ["--out", tmp_path / "run", "--set", "train.steps=2"]
    process = start(*launcher, "train", tiny_yaml, *options, ACCELERATE_USE_CPU="true")
    assert process.wait(150) == 0, (tmp_path / "output").read_text()
    assert read_checkpoint(folder_of(tmp_path / "run", 2), []).state["world_size"] == processes


@pytest.mark.slow
def test_accelerate_starts_two_machines(start, tiny_yaml, tmp_path):
    """Both on this one: each starts one of the two processes."""
    accelerate = Path(sys.executable).with_name("accelerate")
    launcher = [accelerate, "launch", "--config_file", LAUNCH / "multi_node.yaml", "--num_processes", "2"]
    options = ["-m", "sitdist", "train", tiny_yaml, "--out", tmp_path / "run", "--set", "train.steps=2"]
    variables = {"ACCELERATE_USE_CPU": "true"}
    machines = [start(*launcher, "--machine_rank", rank, *options, **variables) for rank in (0, 1)]
    assert [machine.wait(200) for machine in machines] == [0, 0], (tmp_path / "output").read_text()
    assert read_checkpoint(folder_of(tmp_path / "run", 2), []).state["world_size"] == 2


STUBS = {
    # Two tasks, as Slurm starts them; the exit code is the largest of theirs.
    "srun": """
while [ "${1#--}" != "$1" ]; do shift; done
codes=0
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=0 "$@" & pids="${pids:-} $!"; done
for pid in $pids; do wait "$pid"; code=$?; [ "$code" -gt "$codes" ] && codes=$code; done
exit "$codes"
""",
    "scontrol": """
echo "scontrol $*" >> "$FOLDER/calls"
if [ "$1" = show ]; then printf 'node-a\\nnode-b\\n'; fi
""",
    "python": """
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$FOLDER/calls"
exit "$CODE"
""",
}


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True)])
def test_slurm_gives_every_task_its_place_and_requeues_what_wants_to_be_resumed(start, tmp_path, code, requeued):
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FOLDER": str(tmp_path), "CODE": str(code)}
    command = ["train", "my config.yaml", "--out", "runs/x"]
    process = start(LAUNCH / "slurm.sh", *command, **job, **variables, PYTHON="python")
    assert process.wait(30) == code, (tmp_path / "output").read_text()
    show, *tasks = (tmp_path / "calls").read_text().splitlines()
    assert show == "scontrol show hostnames node-[a-b]"
    assert ("scontrol requeue 123" in tasks) == requeued
    expected = "2 1 node-a 20123 -m sitdist train my config.yaml --out runs/x"
    assert sorted(tasks[:2]) == [f"0 0 {expected}", f"1 0 {expected}"]


BACKENDS = {"fsdp2.yaml": "fsdp2", "zero1.yaml": "zero1", "zero2.yaml": "zero2"}  # others: ddp
OF_ACCELERATE = sorted(path for path in LAUNCH.glob("*.yaml") if path.name != "kubernetes.yaml")


@pytest.mark.parametrize("path", OF_ACCELERATE, ids=lambda path: path.name)
def test_a_launch_file_says_where_and_nothing_about_the_experiment(path):
    settings = load_config_from_file(str(path))
    assert settings.mixed_precision == "no"
    values = yaml.safe_load(path.read_text())
    assert not values.keys() & Config.model_fields.keys()
    assert not [key for key in values if "accumulation" in key]
    assert backend_of_file(values) == BACKENDS.get(path.name, "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
def test_accelerate_starts_every_backend(start, tiny_yaml, tmp_path, name):
    accelerate = Path(sys.executable).with_name("accelerate")
    launcher = [accelerate, "launch", "--config_file", LAUNCH / name, "--num_processes", "2", "-m", "sitdist"]
    options = ["--out", tmp_path / "run", "--set", "train.steps=2"]
    process = start(*launcher, "train", tiny_yaml, *options, ACCELERATE_USE_CPU="true")
    assert process.wait(200) == 0, (tmp_path / "output").read_text()
    state = read_checkpoint(folder_of(tmp_path / "run", 2), []).state
    assert (state["world_size"], state["backend"]) == (2, BACKENDS[name])


def test_the_kubernetes_job_starts_this_command_and_asks_for_as_many_gpus_as_processes():
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    trainer = job["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    words = [*trainer["command"], *trainer["args"]]
    assert words[:3] == ["torchrun", "-m", "sitdist"]
    options = make_parser().parse_args(words[3:])
    assert (ROOT / options.config).is_file()
    (pods,) = job["spec"]["podTemplateOverrides"]
    mounted = {mount["name"] for mount in pods["spec"]["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pods["spec"]["volumes"]}


def test_every_launch_file_that_is_named_exists():
    texts = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("shards/*.yaml"), *LAUNCH.glob("*"), *ROOT.glob("README.md")]
    named = {name for path in texts for name in re.findall(r"launch/([\w.]+\.(?:yaml|sh|md))", path.read_text())}
    assert named
    assert {name for name in named if not (LAUNCH / name).is_file()} == set()
