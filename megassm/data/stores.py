"""Where a data set's bytes come from: a folder, a server, a list of links, S3, whatever fsspec knows."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from megassm.data.request import (
    CHUNK_BYTES,
    CONNECT_S,
    CONNECTIONS,
    READ_S,
    RETRIED_STATUS,
    BrokenFetchError,
    ByteRange,
    NoSuchFileError,
    ReplacedFileError,
    Reply,
    Store,
    describe,
    whole_reply,
)
from megassm.data.s3 import S3Store
from megassm.data.signature import QUERY_VARIABLE, query_for
from megassm.data.transport import read_file
from megassm.errors import UserError, install_hint, scheme_of, without_secrets
from megassm.guarded import parse_json

if TYPE_CHECKING:
    import urllib3

RENEW = f"renew what gives access: the URL's signature (data.path, or {QUERY_VARIABLE}), or your credentials"


def open_store(path: str) -> Store:
    """The store of a data set: a path, or a URL with any scheme. A path or URL that ends in `.json` is a list of links,
    {"train/index.json": URL, ...}, for files that are signed one by one.

    Raises:
        UserError: the package for this scheme is not installed, or the list of links is not valid.
    """
    try:
        parts = urlsplit(path)
        parts.port  # noqa: B018  # asked for, because it is checked only then
    except ValueError as error:
        if scheme_of(path):
            raise UserError(
                f"{path}: not a URL ({' '.join(str(error).split())[:80]}); it is SCHEME://HOST/FOLDER"
            ) from None
        return LocalStore(Path(path))
    if parts.path.endswith(".json"):
        return _links(path)
    match scheme_of(path):
        case "":
            return LocalStore(Path(path))
        case "file":
            return LocalStore(Path(unquote(urlsplit(path).path)))
        case "http" | "https":
            return HttpStore(path)
        case "s3":
            return S3Store(path)
        case _:
            return FsspecStore(path)


@dataclass(frozen=True)
class LocalStore:
    """A folder of this machine, or of a file system it has mounted."""

    directory: Path

    @property
    def place(self) -> str:
        return str(self.directory)

    def child(self, name: str) -> LocalStore:
        return LocalStore(self.directory / name)

    def request(self, name: str, span: ByteRange, etag: str | None) -> Reply:
        try:
            with open(self.directory / name, "rb") as file:
                file.seek(span.offset)
                data = file.read(-1 if span.size is None else span.size)
        except (FileNotFoundError, NotADirectoryError):
            raise NoSuchFileError from None
        except PermissionError as error:
            raise UserError(f"{self.directory / name}: {error.strerror}; let this user read it") from None
        except OSError as error:
            raise BrokenFetchError(error.strerror or "cannot be read") from None
        return whole_reply(data)


class HttpStore:
    """A folder of an HTTP server: ranges are required. A query in the URL (a signature) is sent with every file."""

    def __init__(self, url: str, pool: urllib3.PoolManager | None = None) -> None:
        parts = urlsplit(url)
        self._url = url if parts.query else urlunsplit(parts._replace(query=query_for(url)))
        self._pool = pool or _pool(without_secrets(url))

    @property
    def place(self) -> str:
        return without_secrets(self._url).rstrip("/")

    def child(self, name: str) -> HttpStore:
        return HttpStore(self._file_url(name), self._pool)

    def _file_url(self, name: str) -> str:
        parts = urlsplit(self._url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))

    def request(self, name: str, span: ByteRange, etag: str | None) -> Reply:
        return http_request(self._pool, self._file_url(name), span, etag)


class LinkedStore:
    """Files that have a URL each."""

    def __init__(self, place: str, links: Mapping[str, str], pool: urllib3.PoolManager, prefix: str = "") -> None:
        self.place, self._links, self._pool, self._prefix = place, links, pool, prefix

    def child(self, name: str) -> LinkedStore:
        return LinkedStore(f"{self.place}/{name}", self._links, self._pool, f"{self._prefix}{name}/")

    def request(self, name: str, span: ByteRange, etag: str | None) -> Reply:
        url = self._links.get(self._prefix + name)
        if url is None:
            raise NoSuchFileError
        return http_request(self._pool, url, span, etag)


def _links(path: str) -> LinkedStore:
    parts = urlsplit(path)
    folder, slash, name = parts.path.rpartition("/")
    raw = read_file(open_store(urlunsplit(parts._replace(path=folder or slash or "."))), name)
    links = parse_json(raw, path)
    if not isinstance(links, dict) or not all(
        isinstance(link, str) and link.startswith("http") for link in links.values()
    ):
        raise UserError(f"{path}: not a list of links; it holds {{'train/index.json': 'https://...', ...}}") from None
    return LinkedStore(without_secrets(path), links, _pool(next(iter(links.values()), "http://")))


def _pool(url: str) -> urllib3.PoolManager:
    """Connections of several threads, through the proxy that the environment names."""
    from urllib.request import getproxies, proxy_bypass

    import urllib3

    timeout = urllib3.Timeout(connect=CONNECT_S, read=READ_S)
    proxy = getproxies().get(scheme_of(url))
    if proxy and not proxy_bypass(urlsplit(url).hostname or ""):
        return urllib3.ProxyManager(proxy, maxsize=CONNECTIONS, timeout=timeout)
    return urllib3.PoolManager(maxsize=CONNECTIONS, timeout=timeout)


def http_request(pool: urllib3.PoolManager, url: str, span: ByteRange, etag: str | None) -> Reply:
    """One ranged GET, redirects followed. See `megassm.data.request` for what is raised."""
    import urllib3

    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    headers = {"Range": span.header, "Accept-Encoding": "identity"}
    if at:
        headers["Authorization"] = "Basic " + base64.b64encode(unquote(user).encode()).decode()
    if etag and not etag.startswith("W/"):  # If-Match never matches a weak one; the answer's is compared anyway
        headers["If-Match"] = etag
    once = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5)
    try:
        response = pool.request(
            "GET", urlunsplit(parts._replace(netloc=host)), headers=headers, preload_content=False, retries=once
        )
    except urllib3.exceptions.LocationValueError:
        raise UserError(f"{url}: not a URL that can be read") from None
    except urllib3.exceptions.HTTPError as error:
        raise BrokenFetchError(describe(error)) from None
    try:
        length = _checked_length(response, url, span)
    except BaseException:
        response.close()
        raise
    chunks = _chunks(response) if length else iter(())  # a 416 has a text for people
    return Reply(length, response.headers.get("ETag"), chunks, response.close)


def _checked_length(response: urllib3.BaseHTTPResponse, url: str, span: ByteRange) -> int:
    """Bytes the body has, where the status and the headers are what was asked for."""
    match response.status:
        case 206:
            return _range_length(response.headers.get("Content-Range", ""), span)
        case 416:
            return 0
        case 412:
            raise ReplacedFileError
        case 404 | 410:
            raise NoSuchFileError
        case 401 | 403 as status:
            raise UserError(f"{url}: access denied (HTTP {status}): wrong or expired credentials; {RENEW}")
        case 200 if span.size is None and span.offset == 0:  # an empty file has no range
            return int(response.headers.get("Content-Length", -1))
        case 200:
            raise UserError(
                f"{url}: the server ignores Range (HTTP 200 instead of 206); serve the data by one that does not"
            )
        case status if status in RETRIED_STATUS:
            raise BrokenFetchError(f"HTTP {status}", _retry_after(response.headers.get("Retry-After", "")))
        case status:
            raise UserError(f"{url}: HTTP {status}, expected 206; look at the server's log, or at the URL")


def _range_length(content_range: str, span: ByteRange) -> int:
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", content_range.strip())
    if not found:
        raise BrokenFetchError(f"HTTP 206 with Content-Range {content_range[:80]!r}")
    first, last = int(found[1]), int(found[2])
    length = last - first + 1
    if first != span.offset or length < 1 or (span.size is not None and length > span.size):
        raise BrokenFetchError(f"asked for {span.header}, the server answered {content_range[:80]!r}")
    return length


def _retry_after(value: str) -> float:
    return float(value) if value.isdecimal() else 0.0  # a date is treated like none


def _chunks(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """The body as it arrives: `read1` hands over what one read of the socket gave, so that a trickle is seen."""
    import urllib3

    try:
        while chunk := response.read1(CHUNK_BYTES, decode_content=False):
            yield chunk
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise BrokenFetchError(describe(error)) from None


class FsspecStore:
    """Any other scheme (gs, az, hf, ...), through fsspec and its package for that scheme; its usual credentials."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        try:
            import fsspec
        except ImportError:
            raise UserError(f"{url}: needs the package fsspec: {install_hint('fsspec')}") from None
        try:
            self._files: Any = fsspec.core.url_to_fs(url)[0]
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: fsspec cannot read {scheme_of(url)}:// here ({type(error).__name__}); "
                            "install its package for that scheme, such as gcsfs or adlfs") from None  # fmt: skip

    @property
    def place(self) -> str:
        return without_secrets(self._url)

    def child(self, name: str) -> FsspecStore:
        return FsspecStore(f"{self._url}/{name}")

    def request(self, name: str, span: ByteRange, etag: str | None) -> Reply:
        stop = None if span.size is None else span.offset + span.size
        try:
            data = self._files.cat_file(f"{self._url}/{name}", start=span.offset or None, end=stop)
        except FileNotFoundError:
            raise NoSuchFileError from None
        except PermissionError:
            raise UserError(f"{self.place}/{name}: access denied; {RENEW}") from None
        except Exception as error:  # each package raises its own
            raise BrokenFetchError(type(error).__name__) from None
        return whole_reply(data)
