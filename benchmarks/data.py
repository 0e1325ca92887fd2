"""Benchmark of reading, rendering and encoding."""

from __future__ import annotations

from benchmarks.measure import format_table, machine
from sitdist import checks
from sitdist.io.files import require_memory


def bench_data(
    dataset: str, split: str, batch: int, samples: int, synthetic: int | None, views: int, scene: str | None
) -> str:
    """The report: the machine, then reading `samples` samples a measure, and rendering, encoding, building `views`."""
    from benchmarks.reading import SAMPLES_PER_SHARD, bench_first_batch, bench_reading, bench_synthetic
    from benchmarks.views import bench_views
    from sitdist.dataset.manifest import MAX_SAMPLES
    from sitdist.scene.views import open_scene

    if synthetic is not None:
        checks.whole("--synthetic", synthetic, 1, MAX_SAMPLES)
    require_memory(200 * batch, f"batches of {batch:,} samples", "give a smaller --batch")
    require_memory(
        3000 * (synthetic or 0) // SAMPLES_PER_SHARD, f"{synthetic or 0:,} samples", "give fewer --synthetic ones"
    )
    open_scene(scene)  # before minutes are spent on what comes first
    lines = [machine(), ""]
    if synthetic is not None:  # first, as memory is measured by its peak
        lines += [*bench_synthetic(dataset, split, batch, synthetic), ""]
    lines += [*format_table("reading", "samples/s", bench_reading(dataset, split, batch, samples)), ""]
    lines += [*bench_first_batch(dataset, split, batch), ""]
    return "\n".join(lines + bench_views(dataset, views, scene))
