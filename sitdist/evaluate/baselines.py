"""What an evaluation is held against: poses and pictures that need no learned flow, and the packing's noise floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.reader import ShardReader
from sitdist.errors import DataError
from sitdist.evaluate.measures import Angle, Length
from sitdist.flow import draws
from sitdist.flow.endpoint import pose_endpoint
from sitdist.geometry.packing import PoseStatistics, destandardize, standardize, unpack
from sitdist.geometry.pose import project_to_so3, rotation_error_deg, translation_error

LATENTS_AT_MOST = 20_000  # training views kept for the nearest-view baselines, taken by stride
FLOOR_POSES = 1024
LATENT_CHUNK = 4096
SIGMAS = (2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
BISECTIONS = 12  # halvings in which the largest sigma is found, from a factor of 2 to one of 1.0002
LARGEST_SIGMA = 64.0


def constant_pose(camera_to_world: Tensor) -> Tensor:
    """One pose [4, 4] float64 for all of [N, 4, 4]: the mean rotation projected to SO(3), and the mean position."""
    mean = camera_to_world.to(torch.float64).mean(0)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = project_to_so3(mean[:3, :3])
    pose[:3, 3] = mean[:3, 3]
    return pose


@dataclass(frozen=True)
class NoiseFloor:
    """Mean errors that the endpoint's own noise leaves in a packed pose: degrees, and the dataset's units."""

    rotation_deg: Angle
    translation: Length


def noise_floor(
    camera_to_world: Tensor, statistics: PoseStatistics, sigma: float, latent: Sequence[int], seed: int
) -> NoiseFloor:
    """Mean errors of poses [N, 4, 4] packed into a latent (C, h, w), given noise sigma * N(0, 1), and unpacked again.

    Every entry keeps noise of deviation 2 sigma / L on an L x L latent of four channels, for either layout, so an
    inversion estimator that recovers x0 perfectly is still off by this much; a gain divides sigma. Monte Carlo over
    at most FLOOR_POSES poses, taken by stride, with keyed noise. An estimator of the mean of x0, such as one_step,
    has no such floor.
    """
    poses = camera_to_world[:: max(1, math.ceil(len(camera_to_world) / FLOOR_POSES))]
    errors: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(poses), 128):
        true = poses[start : start + 128]
        positions = torch.arange(start, start + len(true))
        noise = draws.normal(seed, "noise floor", positions, math.prod(latent)).reshape(-1, *latent)
        intrinsics = statistics.mean[3].expand(len(true), 4) if statistics.has_intrinsics else None
        x0 = pose_endpoint(standardize(true, statistics, intrinsics), noise.double(), sigma)
        read = destandardize(unpack(x0), statistics)
        errors.append((rotation_error_deg(read[:, :3, :3], true[:, :3, :3]), translation_error(read, true)))
    rotation, translation = (torch.cat(parts).mean() for parts in zip(*errors, strict=True))
    return NoiseFloor(float(rotation), float(translation))


@dataclass(frozen=True)
class TrainingViews:
    """Training views by latent and by camera, for the nearest-view baselines.

    `latents` [N, C, h, w] float32 (posterior means), `camera_to_world` [N, 4, 4] float64, `labels` [N]. A view is only
    compared with training views of its own label.
    """

    latents: Tensor
    camera_to_world: Tensor
    labels: Tensor

    def nearest_by_latent(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Poses [B, 4, 4] of the training views whose latents are nearest in L2 to `latents` [B, C, h, w]."""
        queries = latents.flatten(1)
        parts = []
        for start in range(0, len(self.latents), LATENT_CHUNK):  # |a - b|^2 = |b|^2 - 2 a.b + const
            chunk = self.latents[start : start + LATENT_CHUNK].flatten(1)
            parts.append(chunk.square().sum(1)[None, :] - 2.0 * queries @ chunk.T)
        return self.camera_to_world[self._nearest(torch.cat(parts, dim=1), labels)]

    def nearest_by_camera(self, camera_to_world: Tensor, labels: Tensor) -> Tensor:
        """Latents [B, C, h, w] of the training views whose cameras are nearest to `camera_to_world` [B, 4, 4].

        The distance is the rotation's angle in radians plus the distance of the positions over the query's radius.
        """
        queries = camera_to_world[:, None]  # [B, 1, 4, 4] against [N, 4, 4]
        rotation = torch.deg2rad(rotation_error_deg(queries[..., :3, :3], self.camera_to_world[:, :3, :3]))
        radius = torch.linalg.vector_norm(camera_to_world[:, :3, 3], dim=-1).clamp_min(1e-9)
        translation = translation_error(queries, self.camera_to_world) / radius[:, None]
        return self.latents[self._nearest(rotation + translation, labels)]

    def _nearest(self, distance: Tensor, labels: Tensor) -> Tensor:
        """Row-wise argmin of `distance` [B, N] among training views of the row's label."""
        same = labels[:, None] == self.labels[None, :]
        if not same.any(1).all():
            label = int(labels[~same.any(1)][0])
            raise DataError(f"label {label} has no training view to compare with; evaluate objects seen in training")
        return distance.masked_fill(~same, math.inf).argmin(1)


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
        """The largest sigma up to LARGEST_SIGMA with a rotation floor below `target_deg`; None if that one is, too."""
        if self.at(LARGEST_SIGMA).rotation_deg < target_deg:
            return None
        low, high = 1e-6, LARGEST_SIGMA
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
        lines.append(f"Every sigma up to {LARGEST_SIGMA:g} has a floor below {target_deg:g} deg.")
    else:
        lines.append(f"Largest sigma with a floor below {target_deg:g} deg: {_rounded_down(largest):g}")
    return "\n".join(lines)


def _rounded_down(value: float) -> float:
    """To three digits, never upwards."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.floor(value / unit) * unit:.3g}")
