"""`sitdist view RUN`: a page on this machine where a camera is moved about the object and its picture is rendered."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    command = commands.add_parser("view", help="move a camera in a browser and see what the model renders")
    command.add_argument("run", help="a run, an exported folder, or a hub id")
    command.add_argument("--port", type=int, default=8642, help="on 127.0.0.1; 0: any that is free (default: 8642)")
    command.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    command.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> None:
    from sitdist.api import load
    from sitdist.viewer import make_server

    with make_server(load(options.run, options.device), options.port) as server:
        print(f"http://127.0.0.1:{server.server_address[1]} (Ctrl-C ends it)", flush=True)
        server.serve_forever()
