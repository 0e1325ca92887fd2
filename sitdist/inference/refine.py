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
from sitdist.geometry.camera import Intrinsics
from sitdist.inference.preprocess import square_camera
from sitdist.io.atomic import file_sha256
from sitdist.scene.field import Solids
from sitdist.scene.refine import refine_cameras
from sitdist.scene.store import Scene
from sitdist.scene.views import Colour, backdrop, border_pixels, look, open_scene, scene_files
from sitdist.scene.volume import Rendered

log = logging.getLogger(__name__)
SAME_COLOUR = 0.06  # largest difference of a background pixel from the colour of a plain background
BUILT_IN = "built-in"
# A scene explains a picture whose error over the object is at most this many times the scene's error over whole photos
# that were not fitted. An object covers a quarter of a photo or so, so its own error is twice that.
EXPLAINED = 5.0
UNKNOWN_ERROR = 0.018  # of a scene that held no photos out


@dataclass(frozen=True)
class SceneRefiner:
    """Moves estimates to where the scene looks most like the picture; `name` is as the user gave it.

    background: overrides the scene's own.
    """

    name: str
    scene: Solids | Scene
    background: Colour | None = None

    @classmethod
    def open(cls, name: str, manifest: DatasetManifest, device: torch.device | str = "cpu") -> SceneRefiner:
        """The scene in the folder `name`, or the built-in one, whose poses are in the dataset's frame.

        ConfigError for a dataset of several objects, DataError for a folder that holds no scene.
        """
        if len(manifest.objects) > 1:
            raise ConfigError(
                f"refine '{name}': a scene shows one object and the model knows {len(manifest.objects)}; leave it out"
            )
        scene = open_scene(None if name == BUILT_IN else name, device)
        source = manifest.train_sources()[0]
        background = source.get("background") if source["kind"] == "scene" else None
        return cls(name, scene, None if background is None else tuple(background))

    def fingerprint(self) -> str:
        """Hash that identifies this scene."""
        if isinstance(self.scene, Solids):
            return BUILT_IN
        return file_sha256(scene_files(self.name)[0])  # it holds the hash of the other

    def refine(self, estimate: PoseEstimate, images: Tensor, intrinsics: Tensor) -> PoseEstimate:
        """The estimate of pictures [B, 3, S, S] with normalized `intrinsics` [B, 4], refined.

        NaN for intrinsics that are not known: they are as they were read off the picture, and the focal length is then
        refined, too. The error bars of the unrefined estimate are dropped, its trust stays. `converged` is False where
        the camera is not settled, or the scene does not explain the picture.
        """
        unknown, enough = intrinsics.isnan(), EXPLAINED * self._usual_error()
        if estimate.intrinsics is not None:
            intrinsics = torch.where(unknown, estimate.intrinsics.to(intrinsics), intrinsics)
        refined = refine_cameras(
            self._look,
            images,
            estimate.camera_to_world,
            [square_camera(row, images.shape[-1]) for row in intrinsics.tolist()],
            [self._background_of(image) for image in images],
            enough,
            focal=bool(unknown.any()),
            centre=self._centre(),
        )
        explained = refined.error <= enough
        if int(explained.sum()) < len(images) // 2:
            log.warning(
                "%s: looks like %d of %d pictures only; is it the scene of these pictures, and in the dataset's frame?",
                *(self.name, int(explained.sum()), len(images)),
            )
        return replace(
            estimate,
            camera_to_world=refined.camera_to_world,
            converged=estimate.converged & refined.settled & explained,
            picture_error=refined.error,
            intrinsics=None if estimate.intrinsics is None else _zoomed(intrinsics, refined.zoom),
            rotation_std_deg=refined.rotation_std_deg,
            translation_std=refined.position_std,
            rotation_bars_deg=None,
            translation_bars=None,
        )

    def _look(self, camera_to_world: Tensor, intrinsics: Intrinsics) -> Rendered:
        return look(self.scene, camera_to_world, intrinsics, 1)

    def _background_of(self, image: Tensor) -> Tensor | None:
        """The plain colour [3] behind the object of a picture [3, S, S]: the scene's, or else that of its border."""
        border = border_pixels(image[None])
        for colour in (backdrop(self.scene, self.background).to(image), border.quantile(0.5, dim=0)):
            if ((border - colour).abs().amax(dim=1) < SAME_COLOUR).float().mean() > 0.5:
                return colour
        return None

    def _centre(self) -> Tensor:
        """Where the object is, [3]."""
        middle = torch.zeros(3, dtype=torch.float64)
        if isinstance(self.scene, Solids) or self.scene.frame == "unit":
            return middle
        return self.scene.similarity.inverse().points(middle)

    def _usual_error(self) -> float:
        """The root mean square error of the scene's pictures, by its PSNR on photos that were not fitted."""
        psnr = math.nan if isinstance(self.scene, Solids) else self.scene.held_out.get("psnr", math.nan)
        return 10.0 ** (-psnr / 20.0) if math.isfinite(psnr) else UNKNOWN_ERROR


def _zoomed(intrinsics: Tensor, zoom: Tensor) -> Tensor:
    """Normalized intrinsics [B, 4] with focal lengths times `zoom` [B]."""
    factor = zoom.to(intrinsics)[:, None]
    return torch.cat([intrinsics[:, :2] * factor, intrinsics[:, 2:]], dim=1).double()
