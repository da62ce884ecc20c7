"""A data set in a real S3 (juicefs's gateway, MinIO's code): ranges, conditions, credentials, signed links."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megassm.config.schema import Config
from megassm.data.blocks import BlockReader
from megassm.data.dataset import open_dataset
from megassm.data.index import ShardSet, load_index
from megassm.data.s3 import S3Store
from megassm.data.stores import open_store
from megassm.data.transport import Meter, Patience, Transport
from megassm.errors import UserError
from tests.services import juicefs_s3, s3_client, upload
from tests.shard_sets import random_documents, write_documents
from tools.bench.servers import BUCKET, KEY, SECRET_KEY, Server

QUICK = Patience(deadline_s=20.0, first_wait_s=0.01, longest_wait_s=0.05)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as monkeypatch, juicefs_s3(tmp_path_factory.mktemp("s3"), monkeypatch) as s3:
        yield s3


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_documents(tmp_path_factory.mktemp("set") / "set", random_documents(100))


def reader(shards: ShardSet) -> BlockReader:
    return BlockReader(shards, Transport(shards.store, QUICK, Meter()).fetch)


def read_all(shards: ShardSet) -> list[int]:
    return np.concatenate([reader(shards).read(block) for block in range(len(shards.blocks))]).tolist()


def test_a_data_set_in_s3(s3: Server, local: ShardSet) -> None:
    remote = load_index(open_store(upload(local.directory, "whole")))
    assert remote.store.place == "s3://texts/whole"
    assert remote.fingerprint == local.fingerprint
    assert read_all(remote) == read_all(local)


def test_a_run_opens_its_data_and_tokenizer_in_s3(
    s3: Server, data_path: Path, small_config: Callable[..., Config]
) -> None:
    url = upload(data_path, "run")
    remote, at_home = open_dataset(small_config(f"data.path={url}")), open_dataset(small_config())
    assert remote.train.fingerprint == at_home.train.fingerprint
    assert remote.tokenizer.sha256 == at_home.tokenizer.sha256


def test_a_replaced_object_is_refused_by_name(s3: Server, local: ShardSet) -> None:
    remote = load_index(open_store(upload(local.directory, "replaced")))
    read = reader(remote).read
    read(0)
    s3_client().put_object(Bucket=BUCKET, Key="replaced/shard-00000.tar", Body=b"another object" * 1000)
    with pytest.raises(UserError, match=r"s3://texts/replaced/shard-00000\.tar, at offset \d+: the file was replaced"):
        read(1)


def test_a_short_or_missing_object(s3: Server, local: ShardSet) -> None:
    remote = load_index(open_store(upload(local.directory, "short")))
    offset = int(remote.blocks[1]["offset"])
    whole = (local.directory / "shard-00000.tar").read_bytes()
    for kept, expected in ((offset + 512, "got 512"), (offset, "got 0")):
        s3_client().put_object(Bucket=BUCKET, Key="short/shard-00000.tar", Body=whole[:kept])
        with pytest.raises(UserError, match=rf"shard-00000\.tar, block at offset {offset}: .*{expected}"):
            reader(remote).read(1)
    s3_client().delete_object(Bucket=BUCKET, Key="short/shard-00000.tar")
    with pytest.raises(UserError, match=rf"shard-00000\.tar: no such file, expected .* at offset {offset}"):
        reader(remote).read(1)
    with pytest.raises(UserError, match=r"s3://nosuch/set: there is no bucket 'nosuch' at this endpoint"):
        load_index(open_store("s3://nosuch/set"))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"AWS_SECRET_ACCESS_KEY": "wr0ng-secret"},
            r"access denied \(HTTP 403 SignatureDoesNotMatch\)",
        ),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, r"access denied \(HTTP 403 InvalidAccessKeyId\)"),
        ({"AWS_SESSION_TOKEN": "exp1red-token"}, r"access denied \(HTTP 40[03] "),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, r"no credentials found"),
    ],
)
def test_credentials(
    s3: Server, local: ShardSet, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str | None], expected: str
) -> None:
    upload(local.directory, "guarded")
    monkeypatch.setenv("HOME", str(local.directory))
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"s3://texts/guarded/index\.json: {expected}.*AWS_ACCESS_KEY_ID") as told:
        load_index(open_store("s3://texts/guarded"))
    for secret in (KEY, SECRET_KEY, "wr0ng", "exp1red"):
        assert secret not in str(told.value)


def test_signed_links(s3: Server, local: ShardSet, tmp_path: Path) -> None:
    upload(local.directory, "signed")
    client = s3_client()

    def sign(name: str, seconds: int) -> str:
        key = {"Bucket": BUCKET, "Key": f"signed/{name}"}
        return str(client.generate_presigned_url("get_object", Params=key, ExpiresIn=seconds))

    names = [path.name for path in local.directory.iterdir()]
    links = tmp_path / "links.json"
    links.write_text(json.dumps({name: sign(name, 600) for name in names}))
    assert read_all(load_index(open_store(str(links)))) == read_all(local)
    links.write_text(json.dumps({name: sign(name, -600) for name in names}))
    with pytest.raises(UserError, match=r"/signed/index\.json\?\.\.\.: access denied \(HTTP 403\)") as told:
        load_index(open_store(str(links)))
    assert "Signature" not in str(told.value)


def test_the_gateway_dies_in_the_middle(s3: Server, local: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server: tried again until the deadline, then refused by name."""
    remote = load_index(open_store(upload(local.directory, "dying")))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    transport = Transport(S3Store(remote.store.place), Patience(0.5, 0.01, 0.1), meter := Meter())
    with pytest.raises(UserError, match=r"s3://texts/dying/shard-00000\.tar, at offset 0: .*EndpointConnectionError"):
        transport.fetch("shard-00000.tar", 0, 512)
    assert meter.take().data_reconnects > 2
