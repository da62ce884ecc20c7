"""A folder of an S3 bucket, through boto3: its credential chain, regions and endpoints (AWS_ENDPOINT_URL) as usual.

The body is read as it arrives; boto3's own retries are off, `megassm.data.transport` tries again at the byte reached.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

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
from megassm.errors import UserError, install_hint

CREDENTIALS = (
    "give credentials where AWS's tools look for them: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, "
    "or the machine's role"
)


class S3Store:
    """The objects below s3://BUCKET/PREFIX."""

    def __init__(self, url: str, client: Any = None) -> None:
        self.place = url.rstrip("/")
        parts = urlsplit(self.place)
        self._bucket, self._prefix = parts.netloc, parts.path.lstrip("/")
        self._client = client or _client(url)

    def child(self, name: str) -> S3Store:
        return S3Store(f"{self.place}/{name}", self._client)

    def request(self, name: str, span: ByteRange, etag: str | None) -> Reply:
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        key = f"{self._prefix}/{name}".lstrip("/")
        condition = {"IfMatch": etag} if etag else {}
        try:
            got = self._client.get_object(Bucket=self._bucket, Key=key, Range=span.header, **condition)
        except ClientError as error:
            return self._refused(error.response, name, span)
        except (NoCredentialsError, PartialCredentialsError):
            raise UserError(f"{self.place}/{name}: no credentials found; {CREDENTIALS}") from None
        except BotoCoreError as error:
            refuse_for_good(error, f"{self.place}/{name}")
            raise BrokenFetchError(type(error).__name__) from None
        body = got["Body"]
        return Reply(int(got["ContentLength"]), got.get("ETag"), _chunks(body), body.close)

    def _refused(self, response: dict[str, Any], name: str, span: ByteRange) -> Reply:
        code = str(response.get("Error", {}).get("Code", ""))
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if status == 416:
            return Reply(0, None, iter(()), lambda: None)
        if status == 412:
            raise ReplacedFileError
        if code == "NoSuchBucket":
            raise UserError(f"{self.place}: there is no bucket {self._bucket!r} at this endpoint; correct data.path")
        if status == 407:
            raise UserError(f"{self.place}/{name}: {PROXY_DENIED}")
        if status == 404:
            raise NoSuchFileError
        if status in RETRIED_STATUS or code in ("SlowDown", "RequestTimeout", "InternalError"):
            raise BrokenFetchError(f"HTTP {status} {code}")
        if status in (400, 401, 403):
            what = f"access denied (HTTP {status} {code}): wrong or expired credentials, or no right to read"
            raise UserError(f"{self.place}/{name}: {what}; {CREDENTIALS}")
        raise UserError(f"{self.place}/{name}: HTTP {status} {code} for {span.header}; look at the bucket's settings")


def _client(url: str) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise UserError(f"{url}: needs the package boto3: {install_hint('s3')}") from None
    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        max_pool_connections=CONNECTIONS,
        retries={"total_max_attempts": 1},
        response_checksum_validation="when_required",  # of whole objects; we check each block's
    )
    verify = None if os.environ.get("AWS_CA_BUNDLE") else authority()  # None: as boto3 finds it
    try:
        return boto3.session.Session().client("s3", config=config, verify=verify)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"{url}: boto3 cannot start ({type(error).__name__}); {CREDENTIALS}") from None


def _chunks(body: Any) -> Iterator[bytes]:
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    try:
        while chunk := body.read(CHUNK_BYTES):
            yield chunk
    except (BotoCoreError, HTTPError, OSError) as error:
        raise BrokenFetchError(describe(error)) from None
