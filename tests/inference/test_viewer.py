"""The page of `sitdist view` and its pictures, asked for over HTTP."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch
from PIL import Image

import sitdist
from sitdist.cli import main as cli
from sitdist.errors import ConfigError
from sitdist.geometry.camera import look_at
from sitdist.inference import viewer
from sitdist.inference.viewer import make_server


@pytest.fixture(scope="module")
def flow(tiny_run):
    return sitdist.load(tiny_run)


@contextmanager
def serving(flow):
    """Within `with`: a server at work."""
    with make_server(flow) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def port(flow):
    """The port of a running server."""
    with serving(flow) as server:
        assert server.server_address[0] == "127.0.0.1"
        yield server.server_address[1]


@pytest.fixture(scope="module")
def ask(port):
    """Get a page of the server; gives status, headers and body."""

    def get(path, method="GET", **headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    return get


def send(port, data, timeout=20.0):
    """What the server answers to raw bytes until it ends the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def test_the_page_is_whole_and_asks_for_nothing_elsewhere(ask):
    status, headers, body = ask("/")
    page = body.decode()
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert '"name": "tiny"' in page
    assert "width=device-width" in page
    assert "http://" not in page
    assert "https://" not in page


def test_a_picture_is_what_the_model_renders_from_that_camera(ask, flow):
    status, headers, body = ask("/picture?azimuth=30&elevation=45&radius=3.5")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    place = 3.5 * torch.tensor([np.cos(np.pi / 6), np.sin(np.pi / 6), 1.0]) * 0.5**0.5
    expected = flow.render(look_at(place))[0].permute(1, 2, 0).numpy()
    with Image.open(io.BytesIO(body)) as picture:
        assert np.abs(np.asarray(picture) / 255.0 - expected).max() < 1.01 / 255
    assert ask("/picture?azimuth=31&elevation=45&radius=3.5")[2] != body


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/picture?radius=0", 400, "radius 0.0: expected a number from 1e-06"),
        ("/picture?elevation=91", 400, "elevation_deg 91.0: expected a number from -90 to 90"),
        ("/picture?azimuth=east", 400, "azimuth='east': expected azimuth, elevation, radius or label, a number"),
        ("/picture?azimuth=nan", 400, "azimuth_deg: expected angles in degrees"),
        ("/picture?zoom=2", 400, "zoom='2': expected"),
        ("/picture?radius=3&radius=4", 400, "radius='4': expected"),
        ("/picture?label=7", 400, "label 7: the model knows no such object"),
        ("/picture?" + "a=1&" * 100, 400, "no such camera"),
        ("/picture?" + "a=1&" * 10_000, 414, "a longer query than any camera has"),
        ("/picture?azimuth=%0a%1b[31m", 400, r"azimuth='\n\x1b[31m': expected"),
        ("/../etc/passwd", 404, "no such page"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(ask, path, status, message):
    got, headers, body = ask(path)
    assert got == status
    assert headers["Content-Type"].startswith("text/plain")
    assert body.decode().count("\n") == 1
    assert message in body.decode()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:80"}, 200),
        ({"Host": "[::1]:8642"}, 200),
        ({"Host": "localhost:8642", "Origin": "http://localhost:8642"}, 200),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Host": "example.org:80"}, 403),
        ({"Host": "localhost.example.org"}, 403),
        ({"Host": "127.0.0.1.example.org:8642"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Origin": "http://example.org"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_only_this_machine_by_its_own_name_and_page_is_answered(ask, headers, status):
    assert ask("/", **headers)[0] == status
    assert ask("/picture?radius=4", **headers)[0] == status


@pytest.mark.parametrize(
    ("path", "method"), [("/", "GET"), ("/picture", "GET"), ("/no", "GET"), ("/", "HEAD"), ("/", "POST"), ("/", "X")]
)
def test_every_answer_forbids_frames_other_sites_and_guesses(ask, path, method):
    status, headers, body = ask(path, method)
    assert status == (404 if path == "/no" else 405 if method in ("POST", "X") else 200)
    assert (body == b"") == (method == "HEAD")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Cross-Origin-Resource-Policy"] == headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Referrer-Policy"] == "no-referrer"
    policy = headers["Content-Security-Policy"]
    for part in ("default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"):
        assert part in policy
    assert "unsafe" not in policy
    assert "Access-Control-Allow-Origin" not in headers
    assert "Python" not in headers["Server"]


def test_the_policy_lets_the_pages_own_script_and_style_run_and_no_other(ask):
    import base64
    import hashlib

    _, headers, body = ask("/")
    page = body.decode()
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL)
        own = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{own}'" in headers["Content-Security-Policy"]
    assert not re.search(r"\son\w+=|\sstyle=|javascript:", page)  # what no hash would let run


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GARBAGE\r\n\r\n", b"400"),
        (b"GET /\r\n\r\n", b"403"),  # as HTTP/0.9 had it: no Host
        (b"GET / HTTP/9.9\r\n\r\n", b"505"),
        (b"\x16\x03\x01\x00\r\n\r\n", b"400"),  # TLS
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", b"403"),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", b"431"),
        (b"GET //[ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
        (b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
    ],
)
def test_requests_that_are_none_are_refused_with_headers(port, request_, status):
    answer = send(port, request_)
    assert answer.startswith(b"HTTP/1.0 " + status)
    assert b"Content-Security-Policy: default-src 'none'" in answer


def test_an_error_in_a_request_is_one_line_and_the_next_one_is_answered(ask, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("a bug\nof two lines")

    monkeypatch.setattr(viewer, "picture", fail)
    status, _, body = ask("/picture")
    assert (status, body.count(b"\n")) == (500, 1)
    assert b"a bug" not in body
    monkeypatch.undo()
    assert ask("/picture")[0] == 200
    (line,) = capfd.readouterr().err.splitlines()
    path = re.search(r"saved in (\S+)", line)[1]
    with open(path) as file:
        assert "RuntimeError: a bug" in file.read()
    os.unlink(path)


def ended(connection, within=10.0):
    """Whether the server ends a connection."""
    connection.settimeout(within)
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


def test_slow_and_idle_clients_are_ended(flow, monkeypatch, capfd):
    monkeypatch.setattr(viewer, "SECONDS", 0.4)
    with serving(flow) as server:
        idle = [socket.create_connection(server.server_address) for _ in range(20)]
        begun = time.monotonic()
        with socket.create_connection(server.server_address) as slow, suppress(OSError):
            for byte in b"GET / HTTP/1.1\r\nX: " + b"y" * 200:
                slow.sendall(bytes([byte]))  # each in time
                time.sleep(0.05)
        assert time.monotonic() - begun < 5.0
        assert all(map(ended, idle))
        for connection in idle:
            connection.close()
    assert not server.until
    assert capfd.readouterr().err == ""


def test_two_hundred_connections_hold_no_more_threads_than_there_are_places(flow, monkeypatch):
    monkeypatch.setattr(viewer, "SECONDS", 60.0)
    page = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(flow) as server:
        before = threading.active_count()
        idle = [socket.create_connection(server.server_address) for _ in range(200)]
        assert send(server.server_address[1], page).startswith(b"HTTP/1.0 503")
        assert threading.active_count() - before <= viewer.CONNECTIONS
        for connection in idle:
            connection.close()
        deadline = time.monotonic() + 10.0
        while not (answer := send(server.server_address[1], page)).startswith(b"HTTP/1.0 200"):
            assert time.monotonic() < deadline, answer
            time.sleep(0.05)


@pytest.mark.distributed
def test_ctrl_c_ends_the_command_within_a_second_even_with_open_connections(tiny_run):
    command = [sys.executable, "-m", "sitdist", "view", str(tiny_run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        port = int(re.search(r":(\d+) ", process.stdout.readline())[1])
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for connection in connections[:10]:
            connection.sendall(b"GET /picture HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.3)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "sitdist: interrupted\n"
        assert time.monotonic() - begun < 1.0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        assert process.wait(20) == 130  # torch takes its time to end
        assert process.stderr.read() == ""
        for connection in connections:
            connection.close()


def test_a_port_in_use_is_one_line(flow, tiny_run, capsys):
    with make_server(flow) as server:
        port = server.server_address[1]
        with pytest.raises(ConfigError, match=f"--port {port}: cannot be used"):
            make_server(flow, port)
        assert cli.run(["view", str(tiny_run), "--port", str(port)]) == 2
    assert "give another, or 0 for a free one" in capsys.readouterr().err
