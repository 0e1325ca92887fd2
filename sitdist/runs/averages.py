"""Averages of the weights beside the one that is validated: further decays, and profiles that can be chosen afterwards.

A power profile weights the weights after update s of t by w(s) = (s^(g+1) - (s-1)^(g+1)) / t^(g+1), the discrete form
of p(s) ~ s^g (Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", section 3.1).
Its relative width is sigma_rel, its standard deviation over t. Snapshots of two profiles over a run are combined, by
least squares of the profiles, to any other one.

    RUN/averages/step_00001000.safetensors    NAME/PARAMETER in float32; names are decay_0.99, sigma_rel_0.05, ...
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sitdist.distributed.local_shards import full_tensor, local_shards, shard_like
from sitdist.errors import CheckpointError, ConfigError, DataError
from sitdist.flow.predict import VelocityModel
from sitdist.io.arrays import read_tensors, tensors_sha256
from sitdist.io.atomic import check_free, write_atomically
from sitdist.io.ownership import check_ours

log = logging.getLogger(__name__)
CHUNK = 1 << 16  # updates whose weights are in memory at a time
LARGEST_SIGMA_REL = 12.0**-0.5  # of the plain mean, g = 0
NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})\.safetensors")
AVERAGE = re.compile(r"sigma_rel_(0\.[0-9]+|[0-9.]+e-[0-9]+)")
REMEDY = "put it back, or go on from another checkpoint"


# ------------------------------------------------------------------------------------------------------------ profiles


def exponent_of(sigma_rel: float) -> float:
    """g of the power profile of relative width `sigma_rel`: sigma_rel^2 (g+2)^2 (g+3) = g+1."""
    if not 0.0 < sigma_rel < LARGEST_SIGMA_REL:
        raise ConfigError(f"sigma_rel {sigma_rel:g}: must be above 0 and below {LARGEST_SIGMA_REL:.3f}, such as 0.1")
    low, high = 0.0, 1.0
    while _width(high) > sigma_rel:
        high *= 2.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _width(middle) > sigma_rel else (low, middle)
    return 0.5 * (low + high)


def _width(g: float) -> float:
    return math.sqrt((g + 1.0) / (g + 3.0)) / (g + 2.0)


def power_weights(sigma_rel: float, t: int, updates: np.ndarray) -> np.ndarray:
    """The weight of the parameters after each of `updates` (from 1) in the profile after `t` updates; 0 after t."""
    g = exponent_of(sigma_rel)
    weights = (updates / t) ** (g + 1.0) - ((updates - 1) / t) ** (g + 1.0)
    return np.where(updates <= t, weights, 0.0)


def combine(stored: Sequence[tuple[float, int]], target: tuple[float, int]) -> tuple[list[float], float]:
    """Coefficients of `stored` profiles (sigma_rel, t) that come nearest to `target`, and their relative L2 error.

    The coefficients are divided by their sum, as EDM2's published code does, so that the weights keep their scale.
    """
    count = len(stored) + 1
    products = np.zeros((count, count))
    last = max(t for _, t in (*stored, target))
    for start in range(1, last + 1, CHUNK):
        updates = np.arange(start, min(start + CHUNK, last + 1), dtype=np.float64)
        rows = np.stack([power_weights(sigma_rel, t, updates) for sigma_rel, t in (*stored, target)])
        products += rows @ rows.T
    scale = 1.0 / np.sqrt(np.diag(products))
    normalized = products * scale[:, None] * scale[None, :]
    solution = np.linalg.lstsq(normalized[:-1, :-1], normalized[:-1, -1], rcond=1e-12)[0]
    coefficients = solution * scale[:-1] / scale[-1]
    coefficients /= coefficients.sum()
    residual = np.append(coefficients * scale[-1] / scale[:-1], -1.0)
    error = math.sqrt(max(0.0, float(residual @ normalized @ residual)))
    return coefficients.tolist(), error


# ------------------------------------------------------------------------------------------------------------ tracking


def _decaying(decay: float) -> Callable[[int], float]:
    """What is kept of the average at update number `step` (from 0), as in `Ema`."""
    return lambda step: min(decay, (1 + step) / (10 + step))


def _power(sigma_rel: float) -> Callable[[int], float]:
    """The same for a power profile (Karras et al. 2024, section 3.1): (1 - 1/t)^(g+1) at t = step + 1."""
    g = exponent_of(sigma_rel)
    return lambda step: (step / (step + 1.0)) ** (g + 1.0)


class Averages:
    """Several averages of the trained parameters of `model`, in float32 on its device."""

    def __init__(self, model: nn.Module, decays: Sequence[float], sigma_rels: Sequence[float]) -> None:
        followed = local_shards(model)
        self._names, self._followed = list(followed), list(followed.values())
        self._shared_like = [dict(model.named_parameters())[name] for name in self._names]
        self._kept: list[Callable[[int], float]] = [*map(_decaying, decays), *map(_power, sigma_rels)]
        names = [*(f"decay_{decay:g}" for decay in decays), *(f"sigma_rel_{width:g}" for width in sigma_rels)]
        self.averages = {name: [each.float().clone() for each in self._followed] for name in names}

    @torch.no_grad()
    def update(self, step: int, ok: Tensor) -> None:
        """Move towards the current parameters after update number `step` (from 0), where `ok` (0-d) is true."""
        if not self.averages:
            return
        now = [parameter.float() for parameter in self._followed]
        for averaged, kept in zip(self.averages.values(), self._kept, strict=True):
            lerp_if(averaged, now, 1.0 - kept(step), ok)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All of them by NAME/PARAMETER, whole, one by one; every process goes through it."""
        for average, tensors in self.averages.items():
            for name, tensor, like in zip(self._names, tensors, self._shared_like, strict=True):
                yield f"{average}/{name}", full_tensor(tensor, like)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """The inverse of `tensors` through a file; CheckpointError if it is not there or of other averages."""
        stored = _read(path)
        wanted = {f"{average}/{name}" for average in self.averages for name in self._names}
        if wanted != set(stored):
            kept = sorted({name.partition("/")[0] for name in stored})
            raise CheckpointError(
                f"{path}: holds {', '.join(kept)}, but train.averages asks for {', '.join(self.averages)}; set it back"
            )
        for average, tensors in self.averages.items():
            for name, tensor, like in zip(self._names, tensors, self._shared_like, strict=True):
                tensor.copy_(shard_like(stored[f"{average}/{name}"], like))


# -------------------------------------------------------------------------------------------------------------- on disk


def path_of(run: Path, step: int) -> Path:
    """Where the averages after `step` updates are."""
    return run / "averages" / f"step_{step:08d}.safetensors"


def step_of(path: Path) -> int:
    """The inverse of `path_of`."""
    return int(path.stem.rpartition("_")[2])


def snapshots(run: Path) -> list[Path]:
    """The files of a run's averages, oldest first."""
    return sorted(filter(lambda path: NAME.fullmatch(path.name), (run / "averages").glob("step_*")), key=step_of)


def save(run: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the averages after `step` updates, whole or not at all; one process calls it."""
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path_of(run, step), lambda path: save_file(plain, path, {"sha256": tensors_sha256(plain)}))


def _read(path: Path) -> dict[str, Tensor]:
    """What `save` wrote; CheckpointError if it is damaged. Files of earlier versions tell no SHA-256."""
    tensors = read_tensors(path, None, REMEDY, CheckpointError)
    with safe_open(path, "pt") as file:
        told = (file.metadata() or {}).get("sha256")
    if told not in (None, tensors_sha256(tensors)):
        raise CheckpointError(f"{path}: damaged or altered: its SHA-256 is not the one recorded in it; {REMEDY}")
    return tensors


def prune(run: Path, keep: Iterable[int], every: int | None) -> None:
    """Remove the averages of steps that are neither in `keep` nor multiples of `every`."""
    kept = set(keep)
    for path in snapshots(run):
        step = step_of(path)
        if step not in kept and not (every is not None and step % every == 0):
            path.unlink(missing_ok=True)


def read_average(run: Path, step: int, name: str) -> dict[str, Tensor]:
    """The trained parameters in the average called `name` after `step` updates."""
    stored = _read(path_of(run, step))
    found = {key.partition("/")[2]: tensor for key, tensor in stored.items() if key.partition("/")[0] == name}
    if not found:
        kept = sorted({key.partition("/")[0] for key in stored})
        raise CheckpointError(f"{run}: keeps no average '{name}'; choose one of {', '.join(kept)}")
    return found


# -------------------------------------------------------------------------------------------------------- reconstruct


def reconstruct(run: Path, sigma_rel: float, step: int | None = None) -> tuple[dict[str, Tensor], int, float]:
    """The average of width `sigma_rel` after `step` updates (default: the last snapshot), from the run's snapshots.

    Returns its parameters, the step, and the relative error of the profile.
    """
    exponent_of(sigma_rel)
    paths = [path for path in snapshots(run) if step is None or step_of(path) <= step]
    stored = [(path, name) for path in paths for name in _names_in(path) if AVERAGE.fullmatch(name)]
    if not stored:
        raise CheckpointError(
            f"{run}: has no snapshots of power profiles; train with train.averages.sigma_rels: [0.05, 0.1] and "
            "train.averages.snapshot_every"
        )
    end = step_of(paths[-1]) if step is None else step
    profiles = [(float(name.removeprefix("sigma_rel_")), step_of(path)) for path, name in stored]
    coefficients, error = combine(profiles, (sigma_rel, end))
    sums: dict[str, Tensor] = {}
    for (path, name), coefficient in zip(stored, coefficients, strict=True):
        for parameter, tensor in read_average(run, step_of(path), name).items():
            weighted = coefficient * tensor.double()
            sums[parameter] = sums[parameter] + weighted if parameter in sums else weighted
    return {name: tensor.float() for name, tensor in sums.items()}, end, error


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return sorted({key.partition("/")[0] for key in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); remove it, and the others will do") from None


def reconstruct_to_file(
    run: Path, sigma_rel: float, step: int | None, out: Path | None, overwrite: bool = False
) -> str:
    """`reconstruct` written as .safetensors; returns a line that says where, and how near.

    `out`: by default a file in the run, in place of an earlier one. DataError if it is there already and not to be
    overwritten.
    """
    if out is not None:
        check_free(out, overwrite)
    elif not check_ours(run, "run"):
        raise DataError(f"{run}: no run; give the --out of `sitdist train`")
    tensors, end, error = reconstruct(run, sigma_rel, step)
    place = out or run / "averages" / f"reconstructed_{sigma_rel:g}_at_{end}.safetensors"
    write_atomically(place, lambda path: save_file(tensors, path))
    return f"{place}: sigma_rel {sigma_rel:g} after step {end}, relative error of the profile {error:.2g}"


def use_average(model: nn.Module, run: Path, step: int, average: str) -> None:
    """Put an average into a loaded model: one that the run keeps with the checkpoint of `step`, or a .safetensors.

    CheckpointError where it does not fit.
    """
    network = model.network if isinstance(model, VelocityModel) else model
    where = Path(average) if average.endswith(".safetensors") else path_of(run, step)
    if average.endswith(".safetensors"):
        tensors = read_tensors(where, None, "give a file that `sitdist ema reconstruct` wrote", CheckpointError)
    else:
        tensors = read_average(run, step, average)
    state = network.state_dict()
    for name, tensor in tensors.items():
        if name not in state or state[name].shape != tensor.shape:
            raise CheckpointError(f"{where}: tensor {name} {list(tensor.shape)} fits no weights of {run}; give its own")
    missing = [name for name, each in network.named_parameters() if name not in tensors and name != "pos_embed"]
    if missing:
        raise CheckpointError(f"{where}: has no tensor {missing[0]}; give a file that `sitdist ema reconstruct` wrote")
    network.load_state_dict(state | tensors)


def lerp_if(averaged: list[Tensor], now: list[Tensor], weight: float, ok: Tensor) -> None:
    """averaged <- averaged + weight (now - averaged), where `ok` (0-d, on their device) is true; all else stays."""
    torch._foreach_lerp_(averaged, now, [ok * weight] * len(now))
