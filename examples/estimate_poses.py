"""Print where the cameras of pictures stood: python examples/estimate_poses.py RUN PICTURE..."""

import sys

import sitdist

run, *files = sys.argv[1:]
flow = sitdist.load(run)
estimate = flow.estimate(files)
for number, file in enumerate(files):
    x, y, z = estimate.camera_to_world[number, :3, 3].tolist()
    trust = "" if estimate.trust is None else f", trust {estimate.trust[number]:.2f}"
    print(f"{file}: camera at {x:.2f}, {y:.2f}, {z:.2f}{trust}")
