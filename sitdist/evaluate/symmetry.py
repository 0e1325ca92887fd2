"""Objects that look the same from several sides: found in the training views, and allowed for beside the plain error.

No estimator can tell apart poses whose views coincide. A pair of training views coincides when their latents are as
near as those of neighbouring cameras although their cameras are far apart. Where a good part of the views has such a
counterpart, the motions that take the cameras there are the object's symmetries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sitdist.evaluate.baselines import TrainingViews
from sitdist.evaluate.schema import Angle, Count, Length, Share
from sitdist.geometry.pose import project_to_so3, rotation_error_deg, translation_error

EXAMINED_AT_MOST = 512  # views of every label, by stride
FAR_DEG = 20.0  # cameras of a pair differ by at least this
NEAR = 0.175  # a neighbour: radians of rotation, plus distance over radius
SAME_DEG = 10.0  # motions that differ by less are one symmetry
VIEWS_SHARE, MOTION_SHARE, MOTION_PAIRS = 0.25, 0.02, 3  # less is chance
PAIRS_LISTED = 20


@dataclass(frozen=True)
class Pair:
    """Two training views that coincide, by number; their rotations differ by `angle_deg`; RMS distance of latents."""

    label: Count
    a: Count
    b: Count
    angle_deg: Angle
    distance: Length


@dataclass(frozen=True)
class Symmetry:
    """A motion x -> rotation @ x + translation after which the object of `label` looks as before.

    `support`: the share of the examined views whose counterpart it gives.
    """

    label: Count
    rotation: list[list[float]]
    translation: list[float]
    angle_deg: Angle
    support: Share

    def moved(self, camera_to_world: Tensor) -> Tensor:
        """Poses [..., 4, 4] of the cameras that see the same on the other side."""
        motion = torch.eye(4, dtype=camera_to_world.dtype, device=camera_to_world.device)
        motion[:3, :3] = torch.tensor(self.rotation).to(motion)
        motion[:3, 3] = torch.tensor(self.translation).to(motion)
        return motion @ camera_to_world


@dataclass(frozen=True)
class Symmetries:
    """What was found: how many views were examined, how many coincide with another, the nearest such pairs."""

    examined: Count
    coinciding: Count
    pairs: list[Pair]
    symmetries: list[Symmetry]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_symmetries(views: TrainingViews, numbers: Tensor) -> Symmetries:
    """Coinciding pairs of training views, numbered `numbers` [N], and the symmetries that they show, by label.

    A view without a neighbouring camera says nothing and is not examined.
    """
    pairs: list[Pair] = []
    symmetries: list[Symmetry] = []
    examined = 0
    for label in views.labels.unique().tolist():
        rows = (views.labels == label).nonzero()[:, 0]
        count, first, second, distance = _coinciding(views, rows)
        examined += count
        if not len(first):
            continue
        poses = views.camera_to_world
        angles = rotation_error_deg(poses[first, :3, :3], poses[second, :3, :3])
        both = zip(numbers[first.cpu()].tolist(), numbers[second.cpu()].tolist(), strict=True)
        pairs += [
            Pair(int(label), a, b, float(angle), float(rms))
            for (a, b), angle, rms in zip(both, angles, distance, strict=True)
        ]
        if len(first) >= VIEWS_SHARE * count:
            symmetries += _cluster(int(label), poses[second] @ torch.linalg.inv(poses[first]), count)
    nearest = sorted(pairs, key=lambda pair: (pair.distance, pair.a))[:PAIRS_LISTED]
    return Symmetries(examined, len(pairs), nearest, symmetries)


def _coinciding(views: TrainingViews, rows: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    """How many of the views `rows` were examined; those that coincide, with which, and the RMS of latents."""
    chosen = rows[:: -(-len(rows) // EXAMINED_AT_MOST)]
    latents, poses = views.latents[rows].flatten(1), views.camera_to_world[rows]
    apart = torch.cdist(views.latents[chosen].flatten(1), latents)  # [E, N]
    angle = _angles(views.camera_to_world[chosen], poses)
    places = views.camera_to_world[chosen, :3, 3]
    camera = angle + torch.cdist(places, poses[:, :3, 3]) / torch.linalg.vector_norm(places, dim=-1, keepdim=True)
    itself = rows[None, :] == chosen[:, None]
    beside, neighbour = camera.masked_fill(itself, torch.inf).min(1)
    to_neighbour = apart.gather(1, neighbour[:, None])[:, 0]
    far, counterpart = apart.masked_fill(torch.rad2deg(angle) < FAR_DEG, torch.inf).min(1)
    usable = beside <= NEAR
    same = usable & (far <= to_neighbour)
    return int(usable.sum()), chosen[same], rows[counterpart[same]], far[same] / latents.shape[1] ** 0.5


def _angles(poses: Tensor, others: Tensor) -> Tensor:
    """Angles in radians [E, N] between the rotations of poses [E, 4, 4] and [N, 4, 4]; exact enough to compare."""
    trace = poses[:, :3, :3].flatten(1) @ others[:, :3, :3].flatten(1).T
    return torch.acos((0.5 * (trace - 1.0)).clamp(-1.0, 1.0))


def _cluster(label: int, motions: Tensor, examined: int) -> list[Symmetry]:
    """Motions [P, 4, 4] that agree within SAME_DEG, most frequent first, each cluster as its mean."""
    found = []
    while len(motions) >= max(MOTION_PAIRS, MOTION_SHARE * examined):
        close = torch.rad2deg(_angles(motions, motions)) < SAME_DEG
        members = close[close.sum(1).argmax()]
        count = int(members.sum())
        if count < max(MOTION_PAIRS, MOTION_SHARE * examined):
            break
        rotation = project_to_so3(motions[members, :3, :3].mean(0))
        angle = float(rotation_error_deg(rotation, torch.eye(3, dtype=rotation.dtype, device=rotation.device)))
        translation = motions[members, :3, 3].mean(0)
        found.append(Symmetry(label, rotation.tolist(), translation.tolist(), angle, count / examined))
        motions = motions[~members]
    return found


def symmetry_aware_errors(
    estimated: Tensor, true: Tensor, labels: Tensor, symmetries: list[Symmetry]
) -> tuple[Tensor, Tensor]:
    """Rotation errors in degrees and translation errors [B] against the nearest by rotation of all poses from which the
    view would be the same: the true one and, for its label, those that the symmetries make of it.
    """
    rotation = rotation_error_deg(estimated[:, :3, :3], true[:, :3, :3])
    translation = translation_error(estimated, true)
    for symmetry in symmetries:
        moved = symmetry.moved(true)
        other = rotation_error_deg(estimated[:, :3, :3], moved[:, :3, :3])
        nearer = (other < rotation) & (labels == symmetry.label)
        translation = torch.where(nearer, translation_error(estimated, moved), translation)
        rotation = torch.where(nearer, other, rotation)
    return rotation, translation
