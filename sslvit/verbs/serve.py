"""`sslvit serve`: a page on this machine: drop an image, ask, watch the answer stream.

Python's own http.server and one HTML file, no network beyond the browser that opens it. For one person at a desk, not
for the internet: one answer at a time, no accounts, and only pages of this server may ask.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image

from sslvit.data.decode import BadImage, decode
from sslvit.errors import InputError
from sslvit.vlm.folder import OpenFolder, answer_stream, channels_of, find_vlm, open_folder

MAX_BODY = 32 * 2**20  # bytes of one request


def serve(vlm: str | Path, *, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page of a VLM folder (or run) until interrupted. InputError for no VLM, or a port that is taken."""
    server = make_server(vlm, host, port)
    print(f"{find_vlm(vlm)} answers at http://{host}:{server.server_port} (stop with Ctrl-C)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped")
    finally:
        server.server_close()


def make_server(vlm: str | Path, host: str, port: int) -> ThreadingHTTPServer:
    """The server, listening but not yet serving; port 0 takes a free one."""
    folder = open_folder(vlm, "cuda" if torch.cuda.is_available() else "cpu")
    page = resources.files("sslvit.pages").joinpath("serve.html").read_bytes()
    handler = type("Handler", (_Handler,), {"folder": folder, "page": page, "busy": threading.Lock()})
    try:
        return ThreadingHTTPServer((host, port), handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}:{port} ({error}); choose another --port or --host") from error


class _Handler(BaseHTTPRequestHandler):
    """GET / is the page; POST /ask takes {"image": data URL, "question": text} and streams plain text."""

    folder: OpenFolder
    page: bytes
    busy: threading.Lock
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """The page."""
        if self.path != "/":
            self._refuse(HTTPStatus.NOT_FOUND, "there is only /")
            return
        self._start(HTTPStatus.OK, "text/html; charset=utf-8", len(self.page))
        self.wfile.write(self.page)

    def do_POST(self) -> None:
        """An answer, piece by piece as it is generated."""
        if self.path != "/ask" or not self._from_our_page():
            self._refuse(HTTPStatus.FORBIDDEN, "only the page of this server may ask, at /ask")
            return
        try:
            image, question = self._question()
        except (BadImage, InputError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        with self.busy:
            self._stream(answer_stream(self.folder, image, question))

    def _from_our_page(self) -> bool:
        """Browsers name the page a request comes from; another site's page must not use this model."""
        origin = self.headers.get("Origin")
        return origin is None or urlsplit(origin).netloc == self.headers.get("Host")

    def _question(self) -> tuple[Image.Image, str]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or not 0 < int(length) <= MAX_BODY:
            raise InputError(f"the request must say its length, at most {MAX_BODY >> 20} MiB")
        try:
            asked: Any = json.loads(self.rfile.read(int(length)))
            data = base64.b64decode(asked["image"].rpartition(",")[2], validate=True)
            question = asked["question"].strip()
        except (ValueError, TypeError, KeyError, AttributeError, binascii.Error) as error:
            raise InputError('expected {"image": a data URL, "question": a text}') from error
        if not question:
            raise InputError("the question is empty")
        pixels = decode(data, channels=channels_of(self.folder))
        return Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels), question

    def _stream(self, pieces: Iterator[str]) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in pieces:
            data = piece.encode()
            if data:
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        data = reason.encode()
        self.close_connection = True  # what was sent is not read any further
        self._start(status, "text/plain; charset=utf-8", len(data))
        self.wfile.write(data)

    def _start(self, status: HTTPStatus, kind: str, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the page shows what happens."""
