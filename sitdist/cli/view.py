"""`sitdist view RUN`: a page on this machine where a camera is moved about the object and its picture is rendered."""

from __future__ import annotations

import argparse
from typing import Any

from sitdist.cli.arguments import add_device, whole
from sitdist.cli.outcome import tell
from sitdist.cli.parser import Parser


def add(commands: Any) -> None:
    """Add the command to the command line."""
    commands.add_parser(
        "view", help="Move a camera in a browser and see what the model renders.", options=_options, run=_run
    )


def _options(command: Parser) -> None:
    command.add_argument("run", help="A run, an exported folder, or a hub id.")
    command.add_argument("--port", type=whole(0, 65535), default=8642, help="Port on 127.0.0.1; 0 takes a free one.")
    add_device(command)


def _run(options: argparse.Namespace) -> None:
    from sitdist.inference.load import load
    from sitdist.inference.viewer import make_server

    with make_server(load(options.run, options.device), options.port) as server:
        tell(f"http://127.0.0.1:{server.server_address[1]} (Ctrl-C ends it)")
        server.serve_forever()
