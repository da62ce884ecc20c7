"""A data set in a repository of the Hugging Face hub, through fsspec: the hub is played by a local server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from megassm.data.blocks import BlockReader, local_fetch, read_block
from megassm.data.index import load_index
from megassm.data.stores import open_store
from megassm.data.transport import Meter, Patience, Transport
from tests.shard_sets import random_documents, write_documents

REPOSITORY, COMMIT = "me/set", "1" * 40
hub = pytest.importorskip("huggingface_hub", reason="hf:// is read through huggingface_hub")


class _Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub before it reads a file, and the file."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    folder: Path
    ranges: list[str]

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == f"/api/datasets/{REPOSITORY}":
            return self._answer(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": [], "tags": []}).encode())
        if path.startswith(f"/api/datasets/{REPOSITORY}/tree/main/"):
            folder = self.folder / path.partition("/tree/main/")[2]
            entries = [
                {"type": "file", "path": str(one.relative_to(self.folder)), "size": one.stat().st_size, "oid": "0" * 40}
                for one in sorted(folder.iterdir())
            ]
            return self._answer(json.dumps(entries).encode())
        file = self.folder / path.partition(f"/datasets/{REPOSITORY}/resolve/main/")[2]
        if not file.is_file():
            return self._answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
        content, given = file.read_bytes(), self.headers.get("Range")
        if given is None:
            return self._answer(content)
        self.ranges.append(given)
        first, _, last = given.removeprefix("bytes=").partition("-")
        stop = min(len(content), int(last) + 1 if last else len(content))
        span = f"bytes {first}-{stop - 1}/{len(content)}"
        return self._answer(content[int(first) : stop], 206, {"Content-Range": span})

    def _answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "ETag": '"x"', **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    import fsspec

    handler = type("Hub", (_Hub,), {"folder": tmp_path, "ranges": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": f"http://127.0.0.1:{running.server_port}"})
    yield handler
    running.shutdown()
    running.server_close()


def test_a_data_set_on_a_hub(tmp_path: Path, served: type[_Hub]) -> None:
    local = write_documents(tmp_path / "train", random_documents(50))
    remote = load_index(open_store(f"hf://datasets/{REPOSITORY}/train"))
    assert remote.fingerprint == local.fingerprint
    reader = BlockReader(remote, Transport(remote.store, Patience(deadline_s=20), Meter()).fetch)
    for block, entry in enumerate(local.blocks):
        served.ranges.clear()
        assert reader.read(block).tolist() == read_block(local, block, local_fetch(local.directory)).tolist()
        offset, size = int(entry["offset"]), int(entry["size"])
        assert served.ranges == [f"bytes={offset}-{offset + size - 1}"]  # the block and no more
