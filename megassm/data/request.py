"""One request for a run of bytes of one file: what is asked, what is answered, and how it may fail.

A store answers or raises; it never tries again, that is `megassm.data.transport`'s part. What it raises says
what may be done: `BrokenFetchError` (try again), `NoSuchFileError`, `ReplacedFileError` (it is another one than
before), `UserError` (a person must act). No message holds a URL's query, a header or a library's own text: any of
these may carry a signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

CHUNK_BYTES = 1 << 18
CONNECTIONS = 8  # kept open to one host; more are opened and dropped
CONNECT_S = 10.0
READ_S = 20.0  # without one byte
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class BrokenFetchError(Exception):
    """The connection or the server failed; the same request may succeed."""

    def __init__(self, what: str, wait_s: float = 0.0) -> None:
        super().__init__(what)
        self.wait_s = wait_s  # as the server asked


class NoSuchFileError(Exception):
    """There is no such file."""


class ReplacedFileError(Exception):
    """The file is not the one that was read before."""


@dataclass(frozen=True)
class ByteRange:
    """Bytes asked for: `size` from `offset`, or all from there."""

    offset: int = 0
    size: int | None = None

    @property
    def header(self) -> str:
        """As HTTP's Range says it."""
        return f"bytes={self.offset}-{'' if self.size is None else self.offset + self.size - 1}"


@dataclass(frozen=True)
class Reply:
    """An answered request. Its bytes come as they arrive and may end early: the reader counts."""

    length: int
    """Bytes announced; fewer than asked for where the file ends before."""
    etag: str | None
    """What identifies the file's content, where the store says."""
    chunks: Iterator[bytes]
    close: Callable[[], None]


class Store(Protocol):
    """A folder of files."""

    @property
    def place(self) -> str:
        """The folder for messages, without secrets."""

    def child(self, name: str) -> Store:
        """A folder inside."""

    def request(self, name: str, span: ByteRange, etag: str | None) -> Reply:
        """The bytes `span` of a file; `etag` is what its content must still be."""


def whole_reply(data: bytes, etag: str | None = None) -> Reply:
    """A reply that has arrived already."""
    return Reply(len(data), etag, iter((data,)), lambda: None)


def describe(error: Exception) -> str:
    """What went wrong, in our words: a library's own text may hold the URL."""
    reason = getattr(error, "reason", None)
    name = type(reason if isinstance(reason, Exception) else error).__name__
    return {
        "ReadTimeoutError": f"no byte for {READ_S:g} s",
        "ConnectTimeoutError": f"no connection within {CONNECT_S:g} s",
        "NewConnectionError": "no connection",
        "NameResolutionError": "no such host",
        "IncompleteRead": "the connection ended early",
        "ProtocolError": "the connection broke",
        "SSLError": "the server's certificate or TLS is not accepted",
        "ResponseError": "too many redirects",
    }.get(name, name)
