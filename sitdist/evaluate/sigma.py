"""What noise on the packed pose costs, before any training: the packing's noise floor as a function of sigma."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.evaluate.baselines import FLOOR_POSES, NoiseFloor
from sitdist.flow import draws
from sitdist.geometry.packing import PoseStatistics, destandardize, standardize
from sitdist.geometry.pose import rotation_error_deg, translation_error

SIGMAS = (2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
BISECTIONS = 12  # halvings in which the largest sigma is found, from a factor of 2 to one of 1.0002
LARGEST = 64.0


@dataclass(frozen=True)
class Floors:
    """Predicts the noise floor for any sigma, for poses [N, 4, 4] of a dataset and one draw of the noise.

    Unpacking averages L L / 4 places in C / 4 channels, which leaves every entry noise of deviation
    2 sigma / (L sqrt(C / 4)); from there through the deviations and the projection to SO(3).
    """

    camera_to_world: Tensor
    packed_pose: Tensor
    statistics: PoseStatistics
    latent: tuple[int, int, int]
    noise: Tensor  # [N, 4, 4], standard normal

    @classmethod
    def of(cls, dataset: Path, seed: int = 0) -> Floors:
        """Of at most FLOOR_POSES training poses, taken by stride."""
        manifest = load_manifest(dataset)
        statistics, reader = PoseStatistics.from_dict(manifest.statistics), ShardReader(dataset, "train")
        indices = list(range(0, len(reader), math.ceil(len(reader) / FLOOR_POSES)))
        poses = reader.camera_to_world()[indices]
        intrinsics = reader.intrinsics(indices) if statistics.has_intrinsics else None
        noise = draws.normal(seed, "sigma", torch.arange(len(poses)), 16).reshape(-1, 4, 4).double()
        shape = manifest.latent
        latent = (shape.channels, shape.height, shape.width)
        return cls(poses, standardize(poses, statistics, intrinsics), statistics, latent, noise)

    def entry_deviation(self, sigma: float) -> float:
        """Deviation of the noise that is left in every standardized entry."""
        channels, height, width = self.latent
        return 2.0 * sigma / math.sqrt(height * width * channels / 4)

    def at(self, sigma: float) -> NoiseFloor:
        """Mean errors of the poses read off an x0 that is known exactly."""
        read = destandardize(self.packed_pose + self.entry_deviation(sigma) * self.noise, self.statistics)
        rotation = rotation_error_deg(read[:, :3, :3], self.camera_to_world[:, :3, :3])
        return NoiseFloor(float(rotation.mean()), float(translation_error(read, self.camera_to_world).mean()))

    def largest_below(self, target_deg: float) -> float | None:
        """The largest sigma up to LARGEST with a rotation floor below `target_deg`; None if that one is, too."""
        if self.at(LARGEST).rotation_deg < target_deg:
            return None
        low, high = 1e-6, LARGEST
        while high > 2.0 * low:  # by factors, then by halves
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.at(middle).rotation_deg < target_deg else (low, middle)
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if self.at(middle).rotation_deg < target_deg else (low, middle)
        return low


def sigma_table(dataset: Path, target_deg: float) -> str:
    """The floors of a range of sigmas as a table, and the largest sigma whose floor is below `target_deg` degrees."""
    floors = Floors.of(dataset)
    channels, height, width = floors.latent
    largest = floors.largest_below(target_deg)
    lines = [
        f"Noise floor of the packing on {dataset}: latents {channels}x{height}x{width}, {len(floors.noise)} training "
        "poses.",
        "What inversion cannot get below; the one-step estimate is of the mean and has no such floor.",
        f"{'sigma':>8} | {'per entry':>9} | {'rotation (deg)':>14} | {'translation':>11}",
    ]
    for sigma in sorted({*SIGMAS, *([] if largest is None else [_rounded_down(largest)])}, reverse=True):
        floor = floors.at(sigma)
        mark = "" if floor.rotation_deg < target_deg else f"  not below {target_deg:g} deg"
        lines.append(
            f"{sigma:>8g} | {floors.entry_deviation(sigma):>9.5f} | {floor.rotation_deg:>14.3f} | "
            f"{floor.translation:>11.4f}{mark}"
        )
    if largest is None:
        lines.append(f"Every sigma up to {LARGEST:g} has a floor below {target_deg:g} deg.")
    else:
        lines.append(f"Largest sigma with a floor below {target_deg:g} deg: {_rounded_down(largest):g}")
    return "\n".join(lines)


def _rounded_down(value: float) -> float:
    """To three digits, never upwards."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.floor(value / unit) * unit:.3g}")
