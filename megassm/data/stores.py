"""Where a data set's bytes come from: a folder, a server, a list of links, S3, whatever fsspec knows."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from megassm.data.http import RENEW, connection_pool, http_request
from megassm.data.request import (
    WHOLE_BYTES,
    BrokenFetchError,
    ByteRange,
    NoSuchFileError,
    Reply,
    Store,
    whole_reply,
)
from megassm.data.s3 import S3Store
from megassm.data.signature import query_for
from megassm.data.transport import read_file
from megassm.errors import UserError, install_hint, scheme_of, without_secrets
from megassm.files import open_given
from megassm.guarded import parse_json

if TYPE_CHECKING:
    import urllib3


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
            with open_given(self.directory / name) as file:
                most = max(0, os.fstat(file.fileno()).st_size - span.offset)  # room is made for what is asked for
                file.seek(span.offset)
                data = file.read(min(most, WHOLE_BYTES + 1 if span.size is None else span.size))
        except (FileNotFoundError, NotADirectoryError):
            raise NoSuchFileError from None
        except PermissionError as error:
            raise UserError(f"{self.directory / name}: {error.strerror}; let this user read it") from None
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EISDIR):
                raise UserError(f"{self.directory / name}: {error.strerror}; put the file there itself") from None
            raise BrokenFetchError(error.strerror or "cannot be read") from None
        return whole_reply(data)


class HttpStore:
    """A folder of an HTTP server: ranges are required. A query in the URL (a signature) is sent with every file."""

    def __init__(self, url: str, pool: urllib3.PoolManager | None = None) -> None:
        parts = urlsplit(url)
        self._url = url if parts.query else urlunsplit(parts._replace(query=query_for(url)))
        self._pool = pool or connection_pool(without_secrets(url))

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
    if not isinstance(links, dict) or not all(isinstance(link, str) and _is_link(link) for link in links.values()):
        raise UserError(f"{path}: not a list of links; it holds {{'train/index.json': 'https://...', ...}}") from None
    return LinkedStore(without_secrets(path), links, connection_pool(next(iter(links.values()), "http://")))


def _is_link(link: str) -> bool:
    try:
        parts = urlsplit(link)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


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
        # Where a package has no ranged read of its own (hf), fsspec opens the file, and would read 5 MiB ahead.
        opens = getattr(self._files.cat_file, "__func__", None) is fsspec.AbstractFileSystem.cat_file
        self._options = {"cache_type": "none"} if opens else {}

    @property
    def place(self) -> str:
        return without_secrets(self._url)

    def child(self, name: str) -> FsspecStore:
        return FsspecStore(f"{self._url}/{name}")

    def request(self, name: str, span: ByteRange, etag: str | None) -> Reply:
        stop = span.offset + (WHOLE_BYTES + 1 if span.size is None else span.size)
        try:
            data = self._files.cat_file(f"{self._url}/{name}", start=span.offset or None, end=stop, **self._options)
        except FileNotFoundError:
            raise NoSuchFileError from None
        except PermissionError:
            raise UserError(f"{self.place}/{name}: access denied; {RENEW}") from None
        except Exception as error:  # each package raises its own
            raise BrokenFetchError(type(error).__name__) from None
        return whole_reply(data)
