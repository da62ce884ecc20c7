"""Small files of a data set (block index, tokenizer), kept on this machine under the hash of their content."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from megassm.data.request import Store
from megassm.data.stores import LocalStore
from megassm.data.transport import read_file
from megassm.files import cache_folder, write_atomically


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
        _put(_kept_path(name, hashlib.sha256(raw).hexdigest()), raw)
    return raw


def local_copies(files: Mapping[str, bytes]) -> Path:
    """A folder with these files, which belong together.

    Raises:
        OSError: there is nowhere to put them.
    """
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {len(files[name])} ".encode() + files[name])
    for name, raw in files.items():
        _put(cache_folder() / "data" / digest.hexdigest() / name, raw)
    return cache_folder() / "data" / digest.hexdigest()


def _put(path: Path, raw: bytes) -> None:
    if not path.exists() or path.read_bytes() != raw:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f"{path.name}.{os.getpid()}")  # several ranks may do this at once
        write_atomically(own, raw)
        own.replace(path)


def _kept_path(name: str, sha256: str) -> Path:
    return cache_folder() / "data" / sha256 / name
