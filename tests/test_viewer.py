"""The page of `sitdist view` and its pictures, asked for over HTTP."""

import io
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

import sitdist
from sitdist import cli
from sitdist.errors import ConfigError
from sitdist.geometry.camera import look_at
from sitdist.viewer import make_server


@pytest.fixture(scope="module")
def flow(tiny_run):
    return sitdist.load(tiny_run)


@pytest.fixture(scope="module")
def ask(flow):
    """Get a page of a running server; gives status, type and body."""
    with make_server(flow) as server:
        assert server.server_address[0] == "127.0.0.1"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def get(path, **headers):
            request = urllib.request.Request(f"http://127.0.0.1:{server.server_address[1]}{path}", headers=headers)
            try:
                with urllib.request.urlopen(request) as answer:
                    return answer.status, answer.headers["Content-Type"], answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.headers["Content-Type"], error.read()

        yield get
        server.shutdown()
        thread.join()


def test_the_page_is_whole_and_asks_for_nothing_elsewhere(ask):
    status, kind, body = ask("/")
    page = body.decode()
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert '"name": "tiny"' in page
    assert "width=device-width" in page
    assert "http://" not in page
    assert "https://" not in page


def test_a_picture_is_what_the_model_renders_from_that_camera(ask, flow):
    status, kind, body = ask("/picture?azimuth=30&elevation=45&radius=3.5")
    assert (status, kind) == (200, "image/png")
    place = 3.5 * torch.tensor([np.cos(np.pi / 6), np.sin(np.pi / 6), 1.0]) * 0.5**0.5
    expected = flow.render(look_at(place))[0].permute(1, 2, 0).numpy()
    with Image.open(io.BytesIO(body)) as picture:
        assert np.abs(np.asarray(picture) / 255.0 - expected).max() < 1.01 / 255
    assert ask("/picture?azimuth=31&elevation=45&radius=3.5")[2] != body


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/picture?radius=0", 400, "no such camera"),
        ("/picture?elevation=91", 400, "elevation from -90 to 90"),
        ("/picture?azimuth=east", 400, "azimuth=east: expected azimuth, elevation, radius or label, a number"),
        ("/picture?azimuth=nan", 400, "azimuth=nan: expected"),
        ("/picture?zoom=2", 400, "zoom=2: expected"),
        ("/picture?label=7", 400, "label 7: the model knows no such object"),
        ("/../etc/passwd", 404, "no such page"),
    ],
)
def test_what_cannot_be_shown_is_said(ask, path, status, message):
    got, _, body = ask(path)
    assert got == status
    assert message in body.decode()


def test_a_request_by_another_name_is_refused(ask):
    assert ask("/", Host="example.org:80")[0] == 403
    assert ask("/", Host="localhost:80")[0] == 200


def test_a_port_in_use_is_one_line(flow, tiny_run, capsys):
    with make_server(flow) as server:
        port = server.server_address[1]
        with pytest.raises(ConfigError, match=f"--port {port}: cannot be used"):
            make_server(flow, port)
        assert cli.run(["view", str(tiny_run), "--port", str(port)]) == 2
    assert "give another, or 0 for a free one" in capsys.readouterr().err


def test_the_command_says_where_the_page_is(tiny_run, capsys, monkeypatch):
    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", lambda server: None)
    assert cli.run(["view", str(tiny_run), "--port", "0", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("http://127.0.0.1:")
