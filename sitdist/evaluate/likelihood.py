"""How likely a run finds the latents of a split, given their poses, in bits per dimension."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sitdist import checks
from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.dataset.store import store_of
from sitdist.errors import ConfigError, DataError
from sitdist.flow.likelihood import log_likelihood, rademacher
from sitdist.flow.solve import MOST_STEPS
from sitdist.geometry.packing import standardize
from sitdist.inference.run import LoadedRun, check_codec, load_run
from sitdist.io.atomic import check_free, write_atomically
from sitdist.io.files import require_memory
from sitdist.model.codec import latent_mean

PROBE_BYTES = 40  # of every number of a probe while it is drawn
LIKELIHOOD_FORMAT = "{:<24}{:>8} views   {:>10.3f} +- {:.3f} nats   {:>8.4f} +- {:.4f} bits per dimension"


@dataclass(frozen=True)
class SplitLikelihood:
    """Log densities (nats) of latent means, float64 [N], by key; `dimensions` numbers a latent has."""

    keys: list[str]
    log_density: Tensor
    dimensions: int

    def line(self, name: str) -> str:
        """Means with their standard errors (nan for one view, which has none), as one line of text."""
        bits = -self.log_density / (self.dimensions * math.log(2.0))
        count = len(self.keys)
        errors = [float(each.std()) * count**-0.5 if count > 1 else math.nan for each in (self.log_density, bits)]
        means = float(self.log_density.mean()), float(bits.mean())
        return LIKELIHOOD_FORMAT.format(name, count, means[0], errors[0], means[1], errors[1])


def split_likelihood(
    run: Path,
    split: str = "test",
    data: str | Path | None = None,
    views: int | None = None,
    probes: int = 4,
    method: str = "heun",
    steps: int = 25,
    batch: int = 64,
    seed: int = 0,
    device: torch.device | str = "auto",
    out: Path | None = None,
    overwrite: bool = False,
) -> SplitLikelihood:
    """log p(latent | pose) of the first `views` views of `split`, with `probes` Hutchinson probes each.

    `out`: CSV by view.

    ConfigError for counts below 1 or too large, a run without noise on the poses, and what cannot be integrated;
    DataError for an `out` that is there already, unless it is to be overwritten, and for densities that are not finite.
    """
    if out is not None:
        check_free(out, overwrite)
    checks.whole("--steps", steps, 1, MOST_STEPS)
    for name, value in (("views", views), ("probes", probes), ("batch", batch)):
        if value is not None:
            checks.whole(f"--{name}", value, 1)
    loaded = load_run(run, checks.find_device(device))
    why_not = loaded.config.flow.why_no_picture()
    if why_not is not None:
        raise ConfigError(f"{run}: {why_not}, and has no flow to integrate; choose another run")
    if loaded.endpoint.kind == "pose" and loaded.endpoint.sigma == 0.0:
        raise ConfigError(
            "flow.sigma = 0: without noise on the packed poses a latent has no density given its pose, so there is no "
            "likelihood; train with flow.sigma above 0"
        )
    folder = store_of(loaded.config, data).folder
    manifest = load_manifest(folder)
    if split not in manifest.splits:
        raise ConfigError(f"{folder}: no split '{split}'; it has {', '.join(sorted(manifest.splits))}")
    check_codec(folder, manifest, loaded)
    reader = ShardReader(folder, split)
    count = len(reader) if views is None else min(views, len(reader))
    batch = min(batch, count)
    need = PROBE_BYTES * probes * batch * math.prod(loaded.latent_shape)
    require_memory(need, f"{probes:,} probes of {batch:,} views", "give fewer --probes or a smaller --batch")
    densities = []
    for start in tqdm(range(0, count, batch), "likelihood", unit="batch"):
        indices = list(range(start, min(start + batch, count)))
        densities.append(_of_views(loaded, reader, indices, probes, method, steps, seed))
    result = SplitLikelihood(
        [reader.keys()[i] for i in range(count)], torch.cat(densities), math.prod(loaded.latent_shape)
    )
    bad = (~result.log_density.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise DataError(
            f"view {result.keys[bad[0]]}: its log density is {float(result.log_density[bad[0]])}; the checkpoint has "
            "diverged, or --steps is too low"
        )
    if out is not None:
        _write(out, result)
    return result


def _of_views(
    loaded: LoadedRun,
    reader: ShardReader,
    indices: list[int],
    probes: int,
    method: str,
    steps: int,
    seed: int,
) -> Tensor:
    device = next(loaded.model.parameters()).device
    latents = latent_mean(reader.moments(indices).float()).to(device)
    labels = reader.labels()[indices].to(device)
    poses, intrinsics = reader.camera_to_world()[indices], reader.intrinsics(indices)
    packed_pose = standardize(poses, loaded.statistics, intrinsics).to(device)
    signs = rademacher(seed, torch.tensor(indices, device=device), probes, latents.shape[1:])
    model, zeros = loaded.endpoint.conditioned(loaded.model, packed_pose), torch.zeros_like(latents)
    mean = loaded.endpoint.x0(packed_pose, zeros)  # of x0 given the pose; the gaussian endpoint's is 0
    sigma = loaded.endpoint.sigma if loaded.endpoint.kind == "pose" else 1.0
    return log_likelihood(model, loaded.interpolant, latents, labels, mean, sigma, signs, method, steps).cpu()


def _write(out: Path, result: SplitLikelihood) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["key", "log_density_nats"])
    writer.writerows(zip(result.keys, result.log_density.tolist(), strict=True))
    write_atomically(out, lambda path: path.write_text(table.getvalue()))
