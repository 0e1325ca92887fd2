"""Pages of one file each: templates that share a head and a style, and pictures as part of the page."""

from __future__ import annotations

import base64
import io
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image


def render(template: str, **values: Any) -> str:
    """The page that a template of this folder makes of the values; all of them are escaped."""
    environment = Environment(
        loader=FunctionLoader(read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(inline=lambda name: Markup(read(name)), **values)


def read(name: str) -> str:
    """A file of this folder."""
    return files(__package__).joinpath(name).read_text()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """A file as part of the page."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture_uri(picture: np.ndarray) -> str:
    """A picture [H, W, 3] uint8 as it is; the page enlarges small ones."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return data_uri(buffer.getvalue())
