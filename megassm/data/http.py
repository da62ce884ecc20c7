"""HTTP: ranged requests on connections that are kept, through the proxy that the environment names.

Proxies: http_proxy, https_proxy, no_proxy, with user and password in the URL. Certificate authorities: AUTHORITIES.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from megassm.data.request import (
    CHUNK_BYTES,
    CONNECT_S,
    CONNECTIONS,
    PROXY_DENIED,
    READ_S,
    RETRIED_STATUS,
    BrokenFetchError,
    ByteRange,
    NoSuchFileError,
    ReplacedFileError,
    Reply,
    authority,
    describe,
    refuse_for_good,
)
from megassm.data.signature import QUERY_VARIABLE
from megassm.errors import UserError, scheme_of, without_secrets

if TYPE_CHECKING:
    import urllib3

NUMBER = re.compile("[0-9]{1,18}")
RENEW = f"renew what gives access: the URL's signature (data.path, or {QUERY_VARIABLE}), or your credentials"


def connection_pool(url: str) -> urllib3.PoolManager:
    """Connections of several threads, through the proxy that the environment names."""
    from urllib.request import getproxies, proxy_bypass

    import urllib3

    options: dict[str, Any] = {
        "maxsize": CONNECTIONS,
        "timeout": urllib3.Timeout(connect=CONNECT_S, read=READ_S),
        **_authorities(),
    }
    proxy = getproxies().get(scheme_of(url))
    if not proxy or proxy_bypass(urlsplit(url).hostname or ""):
        return urllib3.PoolManager(**options)
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    user, _, host = parts.netloc.rpartition("@")
    headers = urllib3.make_headers(proxy_basic_auth=unquote(user)) if user else None
    try:
        return urllib3.ProxyManager(urlunsplit(parts._replace(netloc=host)), proxy_headers=headers, **options)
    except (urllib3.exceptions.HTTPError, ValueError):
        rule = "is no proxy that can be used"
        raise UserError(
            f"{without_secrets(parts.geturl())}: {rule}; set {scheme_of(url)}_proxy to http://HOST:PORT"
        ) from None


def _authorities() -> dict[str, str]:
    place = authority()
    return {} if place is None else {"ca_cert_dir" if Path(place).is_dir() else "ca_certs": place}


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
        refuse_for_good(error, url)
        raise BrokenFetchError(describe(error)) from None
    except ValueError:  # of a redirect that leads to no URL
        raise UserError(f"{url}: the server sends on to what is no URL; look at its settings") from None
    try:
        length = _checked_length(response, url, span)
    except BaseException:
        response.close()
        raise
    chunks = _chunks(response) if length else iter(())  # a 416 has a text for people
    return Reply(length, response.headers.get("ETag"), chunks, response.close)


def _checked_length(response: urllib3.BaseHTTPResponse, url: str, span: ByteRange) -> int:
    """Bytes the body has, where the status and the headers are what was asked for."""
    coding = response.headers.get("Content-Encoding", "identity")
    if response.status in (200, 206) and coding != "identity":
        rule = (
            f"the server compresses what it sends (Content-Encoding: {coding[:20]}), and ranges count other bytes then"
        )
        raise UserError(f"{url}: {rule}; turn that off for these files")
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
        case 407:
            raise UserError(f"{url}: {PROXY_DENIED}")
        case 200 if span.size is None and span.offset == 0:  # an empty file has no range
            length = response.headers.get("Content-Length", "")
            return int(length) if NUMBER.fullmatch(length) else -1
        case 200:
            raise UserError(
                f"{url}: the server ignores Range (HTTP 200 instead of 206); serve the data by one that does not"
            )
        case status if status in RETRIED_STATUS:
            raise BrokenFetchError(f"HTTP {status}", _retry_after(response.headers.get("Retry-After", "")))
        case status:
            raise UserError(f"{url}: HTTP {status}, expected 206; look at the server's log, or at the URL")


def _range_length(content_range: str, span: ByteRange) -> int:
    found = re.fullmatch(rf"bytes ({NUMBER.pattern})-({NUMBER.pattern})/({NUMBER.pattern}|\*)", content_range.strip())
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
