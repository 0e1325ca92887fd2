"""A page that shows what a model renders while its camera is moved; served to this machine alone."""

from __future__ import annotations

import io
import json
import math
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch

from sitdist.api import Flow
from sitdist.data.animation import to_images
from sitdist.errors import ConfigError, SitdistError
from sitdist.geometry.camera import look_at

HOST = "127.0.0.1"


def make_server(flow: Flow, port: int = 0) -> ThreadingHTTPServer:
    """A server of the page on 127.0.0.1, not yet serving; ConfigError where the port cannot be had.

    `/` is the page, `/picture?azimuth=30&elevation=20&radius=4&label=0` (degrees and the dataset's units) a PNG.
    """
    why_not = flow.run.config.flow.why_no_picture()
    if why_not:
        raise ConfigError(f"{flow.run.manifest.name}: renders no pictures: {why_not}")
    lock, page = threading.Lock(), _page(flow).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not _is_local(self.headers.get("Host", "")):
                return self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"asked by another name than this machine's\n")
            url = urlsplit(self.path)
            if url.path == "/":
                return self._answer(HTTPStatus.OK, "text/html; charset=utf-8", page)
            if url.path != "/picture":
                return self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"no such page\n")
            try:
                with lock:
                    png = picture(flow, parse_qs(url.query))
            except SitdistError as error:
                return self._answer(HTTPStatus.BAD_REQUEST, "text/plain; charset=utf-8", f"{error}\n".encode())
            return self._answer(HTTPStatus.OK, "image/png", png)

        def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing: a moved camera asks for many pictures."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--port {port}: cannot be used ({reason}); give another, or 0 for a free one") from None


def _is_local(host: str) -> bool:
    """Whether a request names this machine: a page elsewhere cannot reach the server by a name of its own."""
    return host.rsplit(":", 1)[0] in (HOST, "localhost")


def picture(flow: Flow, query: dict[str, list[str]]) -> bytes:
    """A PNG of the camera that a query asks for, which looks at the origin; ConfigError for what is no such camera."""
    low, high = flow.training_radius
    given = {"azimuth": 0.0, "elevation": 20.0, "radius": 0.5 * (low + high), "label": float(min(flow.objects))}
    for name, texts in query.items():
        try:
            number = float(texts[-1])
        except ValueError:
            number = math.nan
        if name not in given or not math.isfinite(number):
            raise ConfigError(f"{name}={texts[-1]}: expected azimuth, elevation, radius or label, a number")
        given[name] = number
    if given["radius"] <= 0 or abs(given["elevation"]) > 90:
        raise ConfigError(f"no such camera: {given}; radius is above 0, elevation from -90 to 90")
    azimuth = torch.tensor([given["azimuth"]], dtype=torch.float64)
    pose = look_at(flow.position(azimuth, given["elevation"], given["radius"]))
    file = io.BytesIO()
    to_images(flow.render(pose, label=int(given["label"])))[0].save(file, format="PNG")
    return file.getvalue()


def _page(flow: Flow) -> str:
    low, high = flow.training_radius
    values = {
        "name": flow.run.config.name,
        "low": round(0.5 * low, 2),
        "high": round(1.5 * high, 2),
        "radius": round(0.5 * (low + high), 2),
        "objects": [[label, name] for label, name in flow.objects.items()],
    }
    data = json.dumps(values, allow_nan=False).replace("<", "\\u003c")
    return PAGE.replace("DATA", data)


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>sitdist view</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 560px; padding: 12px; }
h1 { font-size: 1.2rem; margin: 0 0 8px; }
img { width: 100%; aspect-ratio: 1; display: block; image-rendering: auto; background: #8884; border-radius: 6px;
  touch-action: none; cursor: grab; }
label { display: grid; grid-template-columns: 6rem 1fr 4.5rem; gap: 8px; align-items: center; margin-top: 8px; }
input, select { width: 100%; min-height: 32px; }
output { text-align: right; font-variant-numeric: tabular-nums; }
#status { min-height: 1.5em; margin: 8px 0 0; }
</style>
<h1></h1>
<img alt="the object as the model renders it from this camera" draggable="false">
<label>azimuth <input id="azimuth" type="range" min="-180" max="180" step="1" value="0"><output></output></label>
<label>elevation <input id="elevation" type="range" min="-89" max="89" step="1" value="20"><output></output></label>
<label>radius <input id="radius" type="range" step="0.05"><output></output></label>
<label>object <select id="label"></select><output></output></label>
<p id="status" role="status">Drag the picture, or use the sliders.</p>
<script>
"use strict";
const data = DATA, at = id => document.getElementById(id), image = document.querySelector("img");
document.querySelector("h1").textContent = data.name;
Object.assign(at("radius"), {min: data.low, max: data.high});
at("radius").value = data.radius;
for (const [label, name] of data.objects) at("label").append(new Option(name, label));
if (data.objects.length < 2) at("label").parentElement.style.display = "none";
const inputs = ["azimuth", "elevation", "radius", "label"].map(at);
let busy = false, wanted = false;
async function show() {
  for (const input of inputs) input.parentElement.querySelector("output").textContent =
    input.type !== "range" ? "" : input.id === "radius" ? Number(input.value).toFixed(2) : input.value + "\\u00b0";
  if (busy) { wanted = true; return; }
  busy = true;
  const query = new URLSearchParams(inputs.map(input => [input.id, input.value]));
  try {
    const answer = await fetch("picture?" + query);
    if (!answer.ok) throw new Error(await answer.text());
    const old = image.src;
    image.src = URL.createObjectURL(await answer.blob());
    if (old) URL.revokeObjectURL(old);
    at("status").textContent = "Drag the picture, or use the sliders.";
  } catch (error) { at("status").textContent = error.message; }
  busy = false;
  if (wanted) { wanted = false; show(); }
}
for (const input of inputs) input.addEventListener("input", show);
let from = null;
image.addEventListener("pointerdown", event => {
  from = [event.clientX, event.clientY, +at("azimuth").value, +at("elevation").value];
  image.setPointerCapture(event.pointerId);
});
image.addEventListener("pointermove", event => {
  if (!from) return;
  const turned = from[2] - 0.5 * (event.clientX - from[0]);
  at("azimuth").value = ((turned + 180) % 360 + 360) % 360 - 180;
  at("elevation").value = from[3] + 0.5 * (event.clientY - from[1]);
  show();
});
for (const name of ["pointerup", "pointercancel"]) image.addEventListener(name, () => { from = null; });
image.addEventListener("wheel", event => {
  event.preventDefault();
  at("radius").value = +at("radius").value * Math.exp(0.001 * event.deltaY);
  show();
}, {passive: false});
show();
</script>
</html>
"""
