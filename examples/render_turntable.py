"""Render a trained model's object from a circle of cameras: python examples/render_turntable.py RUN OUT.gif"""

import sys
from pathlib import Path

import sitdist
from sitdist.io.video import save_gif, to_images

run, out = sys.argv[1:]
flow = sitdist.load(run)
pictures = flow.render(flow.turntable(views=24, elevation_deg=20.0))  # [24, 3, H, W] in [0, 1]
save_gif(to_images(pictures), Path(out), frames_per_second=12)
