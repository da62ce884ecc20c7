"""A file of JSON lines read as it grows: only what is new, and from the start again where it was cut or replaced."""

from __future__ import annotations

import os
from pathlib import Path

from megassm.files import open_given
from megassm.run.lines import Known, Record, Unread, read_line

READ_BYTES = 4 * 2**20
"""At most at a time, so that a view of a long run appears at once."""
MARK_BYTES = 256
"""A resumed run cuts its journal and writes other records there: what was before the place tells."""


class FollowedFile:
    """The objects of `path`, of its whole lines, that `is_known` takes; a file that is not there yet is empty."""

    def __init__(self, path: Path, is_known: Known) -> None:
        self._path, self._is_known = path, is_known
        self._restart()
        self.share = 1.0
        """How much of the file is read."""

    def _restart(self) -> None:
        self._place, self._line, self._mark = 0, 1, b""
        self.unread = Unread(self._path)

    def read(self) -> tuple[bool, list[Record]]:
        """(whether what was read before no longer holds, the objects that follow)."""
        try:
            file = open_given(self._path)
        except FileNotFoundError:
            restarted, self.share = self._place > 0, 1.0
            self._restart()
            return restarted, []
        with file:
            file.seek(self._place - len(self._mark))
            restarted = file.read(len(self._mark)) != self._mark
            if restarted:
                self._restart()
                file.seek(0)
            data = file.read(READ_BYTES)
            size = os.fstat(file.fileno()).st_size
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and len(data) == READ_BYTES:
            whole = data  # a line longer than any record: passed over
        self._place += len(whole)
        self._mark = (self._mark + whole)[-MARK_BYTES:]
        self.share = 1.0 if len(data) < READ_BYTES else self._place / max(1, size)
        return restarted, self._objects(whole)

    def _objects(self, whole: bytes) -> list[Record]:
        lines = whole.split(b"\n")
        objects = []
        for number, raw in enumerate(lines, start=self._line):
            line = read_line(raw, self._is_known)
            if not line.whole:
                self.unread.add(number)
            objects += [record for record, _ in line.found]
        self._line += len(lines) - 1
        return objects
