"""What was fetched and is kept on this node, for all its processes: blocks within a bound, small files by their hash.

    DIR/ab/abcdef....block      the raw bytes of one block, named by what they are (fingerprint and number)
    DIR/writing/                blocks on their way to their names, one a thread; not counted
    DIR/bytes                   how much is kept; also the lock under which blocks come and go
    CACHE/data/SHA256/NAME      block indices and tokenizers, a few MB each, without a bound (CACHE: `cache_folder`)

Files appear whole and are read without the lock: the reader checks length and CRC32, and a file that vanished
under it is no hit. So nothing is synced to the disk. The least recently used blocks go first; a use is remembered
as the file's time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megassm.data.request import WHOLE_BYTES, Store
from megassm.data.stores import LocalStore
from megassm.data.transport import read_file
from megassm.errors import UserError
from megassm.files import TEMPORARY_SUFFIX, cache_folder, open_own
from megassm.guarded import read_bytes

SUFFIX = ".block"
WRITING = "writing"
ABANDONED_S = 3600.0
NUMBER_DIGITS = 18
KEPT_AFTER_EVICTION = 0.9  # of the bound, so that not every block looks through the folder


class DiskCache:
    """At most `max_bytes` of blocks in `directory`."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        """UserError where the directory cannot be written."""
        self._directory, self._max_bytes = directory, max_bytes
        self._broken = False
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with self._locked() as file:
                self._evict(file, self._max_bytes)
        except OSError as error:
            what = f"cannot be written ({error.strerror}); give a folder on a local disk, or null"
            raise UserError(f"data.cache_dir = {str(directory)!r}: {what}") from None

    def get(self, fingerprint: str, block: int, size: int, crc32: int) -> bytes | None:
        """The block's bytes, where they are there and sound."""
        path = self._path(fingerprint, block)
        try:
            raw = read_bytes(path, size)
            os.utime(path)
        except (OSError, UserError):
            return None
        return raw if len(raw) == size and zlib.crc32(raw) == crc32 else None

    def put(self, fingerprint: str, block: int, raw: bytes) -> None:
        """Keeps a block, and lets go of others to make space. A disk that fails ends the cache, not the run."""
        if self._broken or len(raw) > self._max_bytes:
            return
        path = self._path(fingerprint, block)
        own = _own_name(self._directory / WRITING / path.name)
        try:
            for folder in (own.parent, path.parent):
                folder.mkdir(exist_ok=True)
            _write_new(own, raw)  # outside the lock, and not synced: a reader checks what it finds
            with self._locked() as file:
                if os.path.lexists(path):
                    if _holds(path, raw):  # another process was first
                        return
                    path.unlink()  # damaged, of any length, or a link
                    self._evict(file, self._max_bytes)
                kept = _number(file) + len(raw)
                if kept > self._max_bytes:
                    target = min(int(KEPT_AFTER_EVICTION * self._max_bytes), self._max_bytes - len(raw))
                    kept = self._evict(file, target) + len(raw)
                own.replace(path)
                _write_number(file, kept)
        except OSError as error:
            self._broken = True
            what = f"{self._directory}: {error.strerror}; nothing more is kept there"
            print(f"warning: data.cache_dir: {what}", file=sys.stderr, flush=True)
        finally:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)

    def _path(self, fingerprint: str, block: int) -> Path:
        name = hashlib.sha256(f"{fingerprint} {block}".encode()).hexdigest()
        return self._directory / name[:2] / f"{name}{SUFFIX}"

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        with open_own(self._directory / "bytes", "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _evict(self, file: IO[bytes], target: int) -> int:
        """Removes the least recently used until `target` bytes are left; returns what is kept."""
        found = []
        for path in self._directory.glob(f"{WRITING}/*"):  # by a process that was killed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()
        for path in self._directory.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                unfinished = path.name.endswith(TEMPORARY_SUFFIX)  # by a process that was killed
                found.append((0 if unfinished else stat.st_mtime_ns, stat.st_size, path))
        kept = sum(size for _, size, _ in found)
        for used_ns, size, path in sorted(found):
            if used_ns and kept <= target:
                break
            path.unlink(missing_ok=True)
            kept -= size
        _write_number(file, kept)
        return kept


def read_known(store: Store, name: str, sha256: str) -> bytes:
    """A file whose content is known by its hash, fetched only where it is not kept. The caller checks the hash.

    Raises:
        FileNotFoundError, UserError: see `Transport.fetch`.
    """
    if isinstance(store, LocalStore):
        return read_file(store, name)
    kept = _kept_path(name, sha256)
    with contextlib.suppress(OSError, UserError):
        raw = read_bytes(kept, WHOLE_BYTES)
        if hashlib.sha256(raw).hexdigest() == sha256:
            return raw
    raw = read_file(store, name)
    with contextlib.suppress(OSError):  # no space, no right: it is fetched again next time
        _keep(_kept_path(name, hashlib.sha256(raw).hexdigest()), raw)
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
        _keep(cache_folder() / "data" / digest.hexdigest() / name, raw)
    return cache_folder() / "data" / digest.hexdigest()


def _keep(path: Path, raw: bytes) -> None:
    """Makes `path` a file of these bytes, whole at any moment; others may do so at once."""
    if not _holds(path, raw):
        path.parent.mkdir(parents=True, exist_ok=True)
        own = _own_name(path)
        try:
            _write_new(own, raw)
            own.replace(path)
        finally:
            own.unlink(missing_ok=True)


def _holds(path: Path, raw: bytes) -> bool:
    """Whether a file holds these bytes, and is none but a link to them."""
    try:
        return not path.is_symlink() and read_bytes(path, len(raw)) == raw
    except (OSError, UserError):
        return False


def _write_new(path: Path, raw: bytes) -> None:
    """Never through a link: others may write to the folder."""
    path.unlink(missing_ok=True)
    with open(path, "xb") as file:
        file.write(raw)


def _kept_path(name: str, sha256: str) -> Path:
    return cache_folder() / "data" / sha256 / name


def _own_name(path: Path) -> Path:
    """A name beside `path` that no other thread of this machine writes to."""
    return path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")


def _number(file: IO[bytes]) -> int:
    file.seek(0)
    text = file.read(NUMBER_DIGITS)
    return int(text) if text.isdigit() else 0


def _write_number(file: IO[bytes], number: int) -> None:
    file.truncate(0)
    file.write(str(number).encode())
    file.flush()
