"""What is said of memory before it is taken, on machines of known size."""

import pytest

from sitdist.errors import OutOfMemoryError
from sitdist.io import files as memory
from sitdist.io.files import require_memory

GB = 2**30


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 100 GiB, of which 60 are free, and 2 of swap; more files as they are given."""

    def make(**files):
        meminfo = f"MemTotal: {100 * 2**20} kB\nMemAvailable: {60 * 2**20} kB\nSwapTotal: {4 * 2**20} kB\n"
        files = {"proc/meminfo": meminfo + f"SwapFree: {2 * 2**20} kB\nHugePages_Total: 0\n"} | files
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(memory, "ROOT", tmp_path)

    return make


def largest():
    """GiB that are granted."""
    low, high = 0, 200
    while high - low > 1:
        middle = (low + high) // 2
        try:
            require_memory(middle * GB, "it", "make it smaller")
            low = middle
        except OutOfMemoryError:
            high = middle
    return low


def test_the_line_says_how_much_is_needed_how_much_is_there_and_the_remedy(machine):
    machine()
    with pytest.raises(OutOfMemoryError, match=r"it: about 107.4 GB of memory, and 66.6 are free; make it smaller"):
        require_memory(100 * GB, "it", "make it smaller")
    require_memory(62 * GB, "it", "")
    require_memory(memory.SMALL - 1, "it", "")


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({}, 62),
        ({"proc/self/cgroup": "0::/\n"}, 62),
        (
            {
                "proc/self/cgroup": "0::/user/run\n",
                "sys/fs/cgroup/user/run/memory.max": "max\n",
                "sys/fs/cgroup/user/memory.max": f"{20 * GB}\n",
                "sys/fs/cgroup/user/memory.current": f"{8 * GB}\n",
                "sys/fs/cgroup/user/memory.stat": f"anon 1\nactive_file {GB}\ninactive_file {2 * GB}\n",
            },
            15,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/job\n0::/\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{30 * GB}\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{10 * GB}\n",
                "sys/fs/cgroup/memory/job/memory.stat": "cache 5\n",
            },
            20,
        ),
        ({"proc/meminfo": "nothing known\n"}, 199),
    ],
)
def test_what_is_there_is_the_machines_or_the_smallest_control_groups(machine, files, granted):
    machine(**files)
    assert largest() == granted


def test_processes_of_one_machine_share_it(machine, monkeypatch):
    machine()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert largest() == 26  # a quarter of all, as the others may have taken theirs already
