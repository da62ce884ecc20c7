"""An HTTP server of a folder that serves ranges as it should, or fails as told: what networks do to a fetch."""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

Fault = Literal["fin", "rst", "503", "stall", "cut", "slow", "flip", "whole", "shifted", "403", "404", "none"]
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class FaultServer(ThreadingHTTPServer):
    """Takes a fault off `faults` for each request for a `faulty` file; serves well when there is none left."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: deque[Fault] = deque()
        self.faulty = ".tar"
        self.ended = threading.Event()
        self.requests: list[tuple[str, dict[str, str]]] = []  # path with query, headers
        self.sent: deque[int] = deque()  # bytes of each answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        name = self.path.partition("?")[0].lstrip("/")
        faulty = self.server.faulty in name and self.server.faults
        fault: Fault = self.server.faults.popleft() if faulty else "none"
        path = self.server.folder / name
        if fault in ("503", "403", "404") or not path.is_file():
            return self.send_error(int(fault) if fault != "none" else 404)
        data = path.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        if self.headers.get("If-Match", etag) != etag:
            return self.send_error(412)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"])
        assert found
        first, last = int(found[1]), min(int(found[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            return self.send_error(416)
        if fault == "rst":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        body = bytearray(data[first : last + 1])
        self._start(200 if fault == "whole" else 206, len(body), etag)
        shown = first + 1 if fault == "shifted" else first
        self.send_header("Content-Range", f"bytes {shown}-{shown + len(body) - 1}/{len(data)}")
        self.end_headers()
        self.server.sent.append(len(body))
        self._send(body, fault)

    def _start(self, status: int, length: int, etag: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", etag)

    def _send(self, body: bytearray, fault: Fault) -> None:
        half = len(body) // 2
        match fault:
            case "fin" | "rst":
                self.wfile.write(body[:half])
                self.close_connection = True
            case "cut":  # at an exact byte, a multiple of a tar record
                self.wfile.write(body[: half // 512 * 512])
                self.close_connection = True
            case "stall":
                self.wfile.write(body[:half])
                self.server.ended.wait(30)
                self.close_connection = True
            case "slow":
                for start in range(0, len(body), 1 + len(body) // 10):
                    self.wfile.write(body[start : start + 1 + len(body) // 10])
                    time.sleep(0.01)
            case "flip":
                body[half] ^= 0x01
                self.wfile.write(body)
            case _:
                self.wfile.write(body)


@contextmanager
def serving(folder: Path) -> Iterator[FaultServer]:
    """Serves a folder until the block is left."""
    server = FaultServer(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
