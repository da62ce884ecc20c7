"""A server that speaks as much of wandb's protocol as a run needs: GraphQL, and a stream of lines for the history."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """What was told of each run, by its id."""

    def __init__(self, rewinds: bool) -> None:
        self.rewinds = rewinds
        self.history: dict[str, list[str]] = {}
        self.upserts: list[dict[str, Any]] = []
        self.operations: list[str] = []

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """The `data` of a GraphQL operation; an empty one for those that a run can do without."""
        self.operations.append(operation)
        match operation:
            case "Viewer" | "viewer":
                return {"viewer": {"id": "1", "entity": "us", "username": "us", "email": "", "admin": False,
                                   "flags": "{}", "teams": {"edges": []}}}  # fmt: skip
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "UpsertBucket":
                name = given["name"]
                new = name not in self.history
                self.history.setdefault(name, [])
                self.upserts.append(given)
                return {"upsertBucket": {"bucket": self._bucket(name), "inserted": new}}
            case "RunResumeStatus":
                known = given["name"] in self.history
                bucket = self._bucket(given["name"]) if known else None
                return {"model": {"id": "p", "name": "megassm", "entity": {"id": "e", "name": "us"}, "bucket": bucket}}
            case "RewindRun" if self.rewinds and given["runName"] in self.history:
                lines = self.history[given["runName"]]
                lines[:] = [line for line in lines if json.loads(line)["_step"] <= given["metricValue"]]
                return {"rewindRun": {"rewoundRun": self._bucket(given["runName"])}}
            case "CreateRunFiles":
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}
        return {}

    def stream(self, run: str, files: dict[str, Any]) -> None:
        """Lines of a run's files, from an offset on."""
        if found := files.get("wandb-history.jsonl"):
            offset, lines = found["offset"], found["content"]
            self.history[run][offset : offset + len(lines)] = lines

    def _bucket(self, name: str) -> dict[str, Any]:
        lines = self.history[name]
        return {
            "id": f"id-{name}", "name": name, "displayName": "run", "description": "", "config": "{}",
            "sweepName": None, "project": {"id": "p", "name": "megassm", "entity": {"id": "e", "name": "us"}},
            "historyLineCount": len(lines), "logLineCount": 0, "eventsLineCount": 0, "summaryMetrics": "{}",
            "historyTail": json.dumps(lines[-1:]), "eventsTail": "[]", "tags": [], "wandbConfig": '{"t": 1}',
        }  # fmt: skip


@contextmanager
def wandb_server(rewinds: bool, takes_files: bool = True) -> Iterator[tuple[WandbServer, str]]:
    """(what it was told, its address); `rewinds` where it can cut a run's history, as wandb's own can. One that does
    not take files never answers what sends them."""
    told = WandbServer(rewinds)
    lock, ended = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            if self.headers.get("Content-Encoding") == "gzip":
                raw = gzip.decompress(raw)
            body = json.loads(raw) if "json" in self.headers.get("Content-Type", "") else {}  # telemetry is not
            if not takes_files and self.path != "/graphql":
                self.close_connection = ended.wait()
                return
            with lock:
                if self.path == "/graphql":
                    found = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
                    data = told.answer(found[1] if found else "", body.get("variables") or {})
                    self._send({"data": data} if data else {"data": None, "errors": [{"message": "not known here"}]})
                    return
                if stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                    told.stream(stream[1], body.get("files") or {})
            self._send({})

        def _send(self, answer: dict[str, Any]) -> None:
            raw = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield told, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
