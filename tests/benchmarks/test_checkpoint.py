"""The benchmark of saving: its table holds what was measured."""

import pytest

from benchmarks import checkpoint as bench_module
from benchmarks.checkpoint import SaveCost, bench_checkpoint, measure_saves
from benchmarks.step import BenchOptions
from sitdist.runs.checkpoint import list_checkpoints


@pytest.mark.distributed
def test_the_benchmark_tells_what_it_measured(tmp_path, monkeypatch):
    cost = measure_saves(BenchOptions("SiT-S/8", batch=2, pairs=2, backends=("fp32",)), tmp_path)
    assert [len(values) for values in (cost.at_once, cost.beside, cost.step, cost.slowdown)] == [2, 2, 2, 2]
    newest = list_checkpoints(tmp_path / "run")[-1]
    assert cost.bytes == sum(path.stat().st_size for path in newest.iterdir())
    monkeypatch.setattr(bench_module, "measure_saves", lambda *_: SaveCost([2.0], [0.5], [1.0], [0.75], 10**9))
    said = bench_checkpoint(BenchOptions("SiT-S/8", backends=("fp32",)))
    assert "checkpoints of 1,000 MB" in said
    assert "0.500 s stall, 25.0% of it" in said
    assert "0.750 s in all, 62.5% with the stall" in said
