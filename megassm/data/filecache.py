"""Small files of a data set (block index, tokenizer), kept on this machine under the hash of their content."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from megassm.data.stores import LocalStore, Store
from megassm.data.transport import read_file
from megassm.durable import cache_folder, write_atomically


def read_known(store: Store, name: str, sha256: str) -> bytes:
    """A file whose content is known by its hash, fetched only where it is not kept. The caller checks the hash.

    Raises:
        FileNotFoundError, UserError: see `Transport.fetch`.
    """
    if isinstance(store, LocalStore):
        return read_file(store, name)
    kept = _kept_path(name, sha256)
    with contextlib.suppress(OSError):
        raw = kept.read_bytes()
        if hashlib.sha256(raw).hexdigest() == sha256:
            return raw
    raw = read_file(store, name)
    with contextlib.suppress(OSError):  # no room, no right: it is fetched again next time
        _keep(raw, name)
    return raw


def local_copy(store: Store, name: str, sha256: str) -> Path:
    """A path where a file can be read that should have this hash.

    Raises:
        FileNotFoundError, UserError: see `Transport.fetch`.
        OSError: there is nowhere to put it.
    """
    return _keep(read_known(store, name, sha256), name)


def _keep(raw: bytes, name: str) -> Path:
    path = _kept_path(name, hashlib.sha256(raw).hexdigest())
    if not path.exists() or path.read_bytes() != raw:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f"{name}.{os.getpid()}")  # several ranks may do this at once
        write_atomically(own, raw)
        own.replace(path)
    return path


def _kept_path(name: str, sha256: str) -> Path:
    return cache_folder() / "data" / sha256 / name
