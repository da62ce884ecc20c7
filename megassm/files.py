"""Files that are whole or not there: written under another name, synced to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

TEMPORARY_SUFFIX = ".tmp"
PRIVATE_MODE = 0o600
"""Of a file that may hold what only its owner may read."""
CACHE_VARIABLE = "MEGASSM_CACHE"


def cache_folder() -> Path:
    """Where what can be made or fetched again is kept: $MEGASSM_CACHE, or below the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megassm"
    return Path(os.environ.get(CACHE_VARIABLE) or default)


def open_temporary(path: Path, mode: int = 0o666) -> IO[bytes]:
    """A new file, with the permissions `mode` less the umask, to write what `commit` will put at `path`.

    What lies at its name is removed, never written to: in a folder that another has made it may be a symbolic link.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    return open(temporary, "xb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, mode))


def open_own(path: Path, mode: str) -> IO[Any]:
    """A file of a run directory to append to, in `mode` as `open` has it.

    Raises:
        OSError: it is a symbolic link; another may have made the folder, and it may lead to any file of this user.
    """
    encoding = None if "b" in mode else "utf-8"
    flags = os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe would wait for a reader
    buffering = 0 if "b" in mode else -1
    return open(path, mode, buffering, encoding, opener=lambda name, given: os.open(name, given | flags, 0o666))


def open_given(path: Path) -> BufferedReader:
    """A regular file to read that another may have made: a pipe would wait for a writer, a device has no end.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    file = open(path, "rb", opener=lambda name, given: os.open(name, given | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return file


def commit(file: IO[bytes], path: Path) -> None:
    """Flushes `file` to disk, closes it and gives it its final name; lasts through a power cut."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)
    sync(path.parent)


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """`path` holds either what it held or all of `data`."""
    with open_temporary(path, mode) as file:
        try:
            file.write(data)
            commit(file, path)
        except OSError as error:
            error.filename = error.filename or str(path)  # a full disk does not say which file it has no room for
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


def open_as_its_folder(path: Path) -> None:
    """Lets those read a file who may read its folder, which the umask has decided: safetensors makes files that only
    their owner may read."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def sync(path: Path) -> None:
    """Waits until a file, or a directory's list of names, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
