"""One request for a run of bytes of one file: what is asked, what is answered, and how it may fail.

A store answers or raises; it never tries again, that is `megassm.data.transport`'s part. What it raises says
what may be done: `BrokenFetchError` (try again), `NoSuchFileError`, `ReplacedFileError` (it is another one than
before), `UserError` (a person must act). No message holds a URL's query, a header or a library's own text: any of
these may carry a signature.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megassm.errors import UserError
from megassm.guarded import JSON_BYTES

CHUNK_BYTES = 1 << 18
CONNECTIONS = 8  # kept open to one host; more are opened and dropped
CONNECT_S = 10.0
READ_S = 20.0  # without one byte
WHOLE_BYTES = JSON_BYTES
"""Of a file that is asked for whole: an index, a tokenizer."""
RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
AUTHORITIES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_DIR")
PROXY_DENIED = (
    "the proxy wants a user and password (HTTP 407); write them in https_proxy or http_proxy, "
    "http://USER:PASSWORD@HOST:PORT"
)


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


def authority() -> str | None:
    """Whose certificates are accepted: a file or folder that one of AUTHORITIES names; None: the system's.

    Raises:
        UserError: it is not there.
    """
    for variable in AUTHORITIES:
        if place := os.environ.get(variable):
            if not Path(place).exists():
                raise UserError(f"{variable} = {place!r}: no such file; name the file of your certificate authority")
            return place
    return None


def refuse_for_good(error: Exception, place: str) -> None:
    """UserError where another try would end the same way: a certificate, a proxy's password."""
    reason = getattr(error, "reason", None) or error
    why = f"{reason} {getattr(reason, 'original_error', '')}"
    if "CERTIFICATE_VERIFY_FAILED" in why:
        found = re.search(r"certificate verify failed: ([a-z' -]+)", why)
        rule = f"the server's certificate is not accepted ({found[1].strip() if found else 'unknown'})"
        way_out = f"name the file of its authority in {AUTHORITIES[0]}"
        raise UserError(f"{place}: {rule}; {way_out}")
    if re.search(r"Tunnel connection failed: 407|\b407 Proxy", why):
        raise UserError(f"{place}: {PROXY_DENIED}")
