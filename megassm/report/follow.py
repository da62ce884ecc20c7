"""A file of JSON lines read as it grows: only what is new, and from the start again where it was cut or replaced."""

from __future__ import annotations

import os
from pathlib import Path

from megassm.files import open_given
from megassm.guarded import parse_object
from megassm.run.records import Record

READ_BYTES = 4 * 2**20
"""At most at a time, so that a view of a long run appears at once."""
MARK_BYTES = 256
"""A resumed run cuts its journal and writes other records there: what was before the place tells."""


class FollowedFile:
    """The whole lines of `path`; a file that is not there yet is empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0
        self._mark = b""
        self.share = 1.0
        """How much of the file is read."""

    def read(self) -> tuple[bool, list[Record]]:
        """(whether what was read before no longer holds, the objects that follow)."""
        try:
            file = open_given(self._path)
        except FileNotFoundError:
            restarted = self._place > 0
            self._place, self._mark, self.share = 0, b"", 1.0
            return restarted, []
        with file:
            file.seek(self._place - len(self._mark))
            restarted = file.read(len(self._mark)) != self._mark
            if restarted:
                self._place, self._mark = 0, b""
                file.seek(0)
            data = file.read(READ_BYTES)
            size = os.fstat(file.fileno()).st_size
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and len(data) == READ_BYTES:
            whole = data  # a line longer than any record: passed over
        self._place += len(whole)
        self._mark = (self._mark + whole)[-MARK_BYTES:]
        self.share = 1.0 if len(data) < READ_BYTES else self._place / max(1, size)
        return restarted, [record for line in whole.splitlines() if (record := parse_object(line)) is not None]
