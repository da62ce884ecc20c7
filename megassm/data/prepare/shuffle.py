"""The global shuffle: all documents of all parts in the order of their keys, a bounded number of ids at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megassm.data.prepare.tokenized import PartStore


@dataclass(frozen=True)
class Bucket:
    """Documents with neighbouring keys, in the order of the shuffle."""

    documents: npt.NDArray[np.void]
    ids: list[npt.NDArray[Any]]

    def rows(self) -> Iterator[tuple[tuple[int, int], bool, npt.NDArray[Any]]]:
        """((split hash, bytes of text), whether a document with this very text came before, ids)."""
        hashes = np.stack([self.documents["key"], self.documents["split"]])  # 128 bits of the content
        repeats = np.all(hashes[:, 1:] == hashes[:, :-1], axis=0).tolist()
        described = self.documents[["split", "text_bytes"]].tolist()
        return zip(described, [False, *repeats][: len(described)], self.ids, strict=True)


class Shuffle:
    """All documents of a store in the order of their keys, a bounded number of ids at a time."""

    def __init__(self, store: PartStore, parts: int, bucket_bytes: int) -> None:
        """Holds about `bucket_bytes` of ids at once."""
        self._store, self._parts, self._bucket_bytes = store, parts, bucket_bytes
        self.id_bytes, self.smallest_split = 0, 2**64
        for part in range(parts):
            documents, ids = store.read(part)
            self.id_bytes += ids.nbytes
            self.smallest_split = min(self.smallest_split, int(documents["split"].min()))

    def buckets(self) -> Iterator[Bucket]:
        """Splits the keys in equal ranges: keys are hashes, so that their documents are nearly equal too."""
        bits = max(0, (self.id_bytes // self._bucket_bytes).bit_length())
        for bucket in range(1 << bits):
            # Duplicates become neighbours, in the order in which they were read: the sort is stable.
            low, high = (bucket << (64 - bits), ((bucket + 1) << (64 - bits)) - 1)
            slices = [self._slice(part, low, high) for part in range(self._parts)]
            documents = np.concatenate([piece.documents for piece in slices])
            ids = [document_ids for piece in slices for document_ids in piece.ids]
            order = np.lexsort((documents["split"], documents["key"]))
            yield Bucket(documents[order], [ids[row] for row in order])

    def _slice(self, part: int, low: int, high: int) -> Bucket:
        documents, ids = self._store.read(part)
        keys = np.ascontiguousarray(documents["key"])
        first = int(np.searchsorted(keys, np.uint64(low), side="left"))
        stop = int(np.searchsorted(keys, np.uint64(high), side="right"))
        if first == stop:
            return Bucket(np.empty(0, dtype=documents.dtype), [])
        ends = np.cumsum(documents["tokens"][:stop], dtype=np.int64)
        start = int(ends[first - 1]) if first else 0
        wanted = np.array(ids[start : int(ends[-1])])  # a copy: lets go of the file
        return Bucket(np.array(documents[first:stop]), np.split(wanted, ends[first:-1] - start))
