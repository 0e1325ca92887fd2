"""Refine poses with a scene: move the camera until the scene's rendering matches the picture."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sitdist.dataset.manifest import DatasetManifest
from sitdist.errors import ConfigError
from sitdist.flow.estimate import PoseEstimate
from sitdist.inference.preprocess import square_camera
from sitdist.io.atomic import file_sha256
from sitdist.scene.field import Solids
from sitdist.scene.refine import refine_look_at
from sitdist.scene.store import Scene
from sitdist.scene.views import Colour, backdrop, look, open_scene, scene_files

log = logging.getLogger(__name__)
BUILT_IN = "built-in"
EXPLAINED = 2.5  # times the scene's error on photos that were not fitted: a picture farther off than this is not of it
UNKNOWN_ERROR = 0.03  # of a scene that held no photos out


@dataclass(frozen=True)
class SceneRefiner:
    """Moves estimates to where the scene looks most like the picture; `name` is as the user gave it.

    supersample: each pixel averages this many rays, squared. background: overrides the scene's own.
    """

    name: str
    scene: Solids | Scene
    supersample: int = 1
    background: Colour | None = None

    @classmethod
    def open(cls, name: str, manifest: DatasetManifest, device: torch.device | str = "cpu") -> SceneRefiner:
        """The scene in the folder `name`, or the built-in one, whose poses are in the dataset's frame.

        Pictures are rendered as the dataset's were, where its recipe says how.

        ConfigError where the dataset's cameras do not all look at its one object upright, DataError for a folder that
        holds no scene.
        """
        cameras = manifest.splits["train"].cameras
        if not (cameras and cameras.looks_at_origin and cameras.upright):
            raise ConfigError(
                f"refine '{name}': only cameras that look at the origin upright are moved, and the manifest does not "
                "say that all training cameras do; leave it out"
            )
        if len(manifest.objects) > 1:
            raise ConfigError(
                f"refine '{name}': a scene shows one object and the model knows {len(manifest.objects)}; leave it out"
            )
        scene = open_scene(None if name == BUILT_IN else name, device)
        source = manifest.train_sources()[0]
        if source["kind"] != "scene":  # pictures of another renderer
            return cls(name, scene)
        background = source.get("background")
        return cls(name, scene, source["supersample"], None if background is None else tuple(background))

    def fingerprint(self) -> str:
        """Hash that identifies this scene."""
        if isinstance(self.scene, Solids):
            return BUILT_IN
        return file_sha256(scene_files(self.name)[0])  # it holds the hash of the other

    def refine(self, estimate: PoseEstimate, images: Tensor, intrinsics: Tensor) -> PoseEstimate:
        """The estimate of pictures [B, 3, S, S] with normalized `intrinsics` [B, 4], refined.

        Intrinsics that were read off the picture are used if there are any. The error bars of the unrefined estimate
        are dropped, its trust stays. `converged` is False where the scene does not explain the picture.
        """
        known = intrinsics if estimate.intrinsics is None else estimate.intrinsics
        cameras = [square_camera(row, images.shape[-1]) for row in known.tolist()]
        rays, background = self.supersample, backdrop(self.scene, self.background)

        def render(camera_to_world: Tensor, rows: Tensor, shrink: int) -> Tensor:
            pictures = [
                look(self.scene, pose, cameras[row].shrunk(shrink), max(rays, min(shrink, 2))).on(background)
                for pose, row in zip(camera_to_world, rows.tolist(), strict=True)
            ]
            return torch.stack(pictures).permute(0, 3, 1, 2).to(images)

        enough = EXPLAINED * self._usual_error()
        refined = refine_look_at(render, images, estimate.camera_to_world, enough=enough)
        explained = refined.residual <= enough
        if int(explained.sum()) < len(images) // 2:
            log.warning(
                "%s: looks like %d of %d pictures only; is it the scene of these pictures, and in the dataset's frame?",
                *(self.name, int(explained.sum()), len(images)),
            )
        return replace(
            estimate,
            camera_to_world=refined.camera_to_world,
            converged=estimate.converged & refined.settled & explained,
            picture_error=refined.residual,
            rotation_std_deg=None,
            translation_std=None,
            rotation_bars_deg=None,
            translation_bars=None,
        )

    def _usual_error(self) -> float:
        """The root mean square error of the scene's pictures, by its PSNR on photos that were not fitted."""
        psnr = math.nan if isinstance(self.scene, Solids) else self.scene.held_out.get("psnr", math.nan)
        return 10.0 ** (-psnr / 20.0) if math.isfinite(psnr) else UNKNOWN_ERROR
