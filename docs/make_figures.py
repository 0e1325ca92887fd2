"""Draw the two pictures of README.md from a run whose dataset shows one scene: python docs/make_figures.py RUN

turntable.gif: the scene from a circle of cameras, beside what the model renders of the same poses.
idea.png: one pose with its noise, the latent of its view, and the interpolant between them.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import sitdist
from sitdist.config.load import parse
from sitdist.config.recipe import SceneSource
from sitdist.geometry.packing import PoseStatistics, standardize
from sitdist.inference.flow import Flow
from sitdist.io.video import to_images
from sitdist.model.codec import latent_mean
from sitdist.scene.views import open_scene, render

VIEWS = 36
SIDE = 160  # pixels of one picture of the animation
COLOURS = 128  # of the animation: fewer make a smaller file
TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
BLUE, VERMILION, GREY = "#0072b2", "#d55e00", "#6b7280"
CENTRED = {"ha": "center", "va": "center", "fontsize": 12}


def true_views(flow: Flow, camera_to_world: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] of the scene that the run was trained on, from cameras [N, 4, 4]."""
    given = flow.run.manifest.recipe["splits"]["train"]
    source = parse(SceneSource, given[0] if isinstance(given, list) else given, "training source")
    scene = open_scene(source.scene)
    assert flow.camera is not None, "the dataset's pictures share no intrinsics"
    pictures = [render(scene, pose, flow.camera, source.supersample, source.background) for pose in camera_to_world]
    return torch.stack(pictures)


def save_turntable(true: Tensor, rendered: Tensor, path: Path) -> None:
    """A loop of pictures [N, 3, H, W] side by side, the true ones on the left."""
    font = ImageFont.load_default(15)
    frames = []
    for left, right in zip(to_images(true), to_images(rendered), strict=True):
        frame = Image.new("RGB", (2 * SIDE + 8, SIDE + 26), "white")
        draw = ImageDraw.Draw(frame)
        for column, (picture, name) in enumerate([(left, "true view"), (right, "rendered from its pose")]):
            x = column * (SIDE + 8)
            frame.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x, 26))
            draw.text((x + SIDE // 2, 13), name, "black", font, anchor="mm")
        frames.append(frame.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE))
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0, optimize=True)


def save_idea(flow: Flow, camera_to_world: Tensor, view: Tensor, path: Path) -> None:
    """One camera [4, 4] and its view [3, H, W] as both ends of the flow, with x_t between them."""
    run = flow.run
    packed = standardize(camera_to_world[None], PoseStatistics.from_dict(run.manifest.statistics))
    x1 = latent_mean(run.codec.encode_moments(view[None]))  # [1, C, h, w]
    noise = torch.randn(x1.shape, generator=torch.Generator().manual_seed(0))
    x0 = run.endpoint.x0(packed, noise)
    points = [run.interpolant.sample(x0, x1, torch.tensor([t])).x_t[0] for t in TIMES]

    figure = Figure(figsize=(11.0, 3.5), dpi=110, facecolor="white")
    columns = figure.subplots(
        1, len(TIMES) + 2, gridspec_kw={"left": 0.01, "right": 0.99, "top": 0.74, "bottom": 0.26, "wspace": 0.28}
    )
    draw_pose(columns[0], camera_to_world)
    for axes, t, point in zip(columns[1:-1], TIMES, points, strict=True):
        axes.imshow(channels_as_tiles(point), cmap="RdBu_r", vmin=-2.5, vmax=2.5)
        axes.set_title(f"t = {t:g}", fontsize=11)
    columns[1].set_xlabel(f"x0 = pack(pose)\n+ {run.config.flow.sigma:g} noise", fontsize=11)
    columns[3].set_xlabel("x_t between them", fontsize=11)
    columns[-2].set_xlabel("x1 = latent\nof the view", fontsize=11)
    columns[-1].imshow(view.permute(1, 2, 0), interpolation="bicubic")
    columns[-1].set_title("view", fontsize=11)
    for axes in columns:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(GREY)

    arrow(figure, (0.16, 0.84), 0.68, BLUE)
    figure.text(0.5, 0.93, "generate: follow the velocity from t = 0 to 1 to render the pose", color=BLUE, **CENTRED)
    arrow(figure, (0.84, 0.13), -0.68, VERMILION)
    figure.text(0.5, 0.05, "invert: read the pose off the view, by one evaluation at t = 1", color=VERMILION, **CENTRED)
    figure.savefig(path)


def draw_pose(axes: Axes, camera_to_world: Tensor) -> None:
    """The sixteen numbers of a camera."""
    axes.set_title("pose", fontsize=11)
    axes.set(xlim=(-0.5, 3.5), ylim=(3.5, -0.5), aspect="equal")
    for row in range(4):
        for column in range(4):
            value = float(camera_to_world[row, column]) + 0.0
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9)
    axes.set_xlabel("camera to world", fontsize=11)


def channels_as_tiles(latent: Tensor) -> Tensor:
    """The channels of a latent [4, h, w] as a square of two by two, [2h, 2w]."""
    return torch.cat([torch.cat([latent[0], latent[1]], dim=1), torch.cat([latent[2], latent[3]], dim=1)])


def arrow(figure: Figure, start: tuple[float, float], length: float, colour: str) -> None:
    """A horizontal arrow over the figure."""
    axes = figure.add_axes((0, 0, 1, 1), facecolor="none")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    axes.annotate(
        "", (start[0] + length, start[1]), start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder (default: docs/images)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    flow = sitdist.load(options.run)
    cameras = flow.turntable(VIEWS, elevation_deg=25.0)
    true = true_views(flow, cameras)
    save_idea(flow, cameras[4], true[4], options.out / "idea.png")
    save_turntable(true, flow.render(cameras), options.out / "turntable.gif")


if __name__ == "__main__":
    main()
