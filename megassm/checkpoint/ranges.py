"""The leading parts of tensors in safetensors files that lie in a store, by ranges: nothing else is fetched.

A tensor's leading rows are contiguous in its file. Of other leading parts, such as columns, many small runs are wanted:
runs are joined over the smallest gaps first, as long as that fetches little more than is wanted, and further where
there would be too many requests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megassm.data.request import CONNECTIONS
from megassm.data.stores import open_store
from megassm.data.transport import Meter, Patience, Transport
from megassm.errors import UserError, without_secrets
from megassm.guarded import parse_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEADER_BYTES = 2**26
"""Of a safetensors file, at most; a thousand layers have 2 MB."""
SURPLUS = 0.02
"""Share of the bytes wanted that may be fetched besides, to save requests."""
REQUESTS = 512
"""From so many on runs are joined whatever lies between them."""
PIECE_BYTES = 2**23
"""A longer run is fetched in pieces, several at a time."""
FETCH_S = 300.0
"""All attempts at one piece."""


class Part(NamedTuple):
    """The leading part of a tensor, without the rows that are there already."""

    key: str
    whole: tuple[int, ...]
    kept: tuple[int, ...]
    first: int = 0
    """Rows that are there."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.kept[0] - self.first, *self.kept[1:])

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first, end) of its runs of numbers in the tensor, in their order."""
        cut = max((axis for axis, pair in enumerate(zip(self.whole, self.kept, strict=True)) if len({*pair}) > 1),
                  default=0)  # fmt: skip
        length = math.prod(self.whole[cut + 1 :])
        starts = np.zeros(1, dtype=np.int64)
        for axis in range(cut):
            rows = np.arange(self.first if axis == 0 else 0, self.kept[axis]) * math.prod(self.whole[axis + 1 :])
            starts = np.add.outer(starts, rows).ravel()
        begin = self.first * length if cut == 0 else 0
        for start in starts.tolist():
            yield start + begin, start + self.kept[cut] * length


class _Stored(NamedTuple):
    """A tensor as the header tells."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """In the file."""


@dataclass
class TensorFiles:
    """safetensors files of one folder of a store, a path or a URL. A file that is replaced after it was first read is
    refused, where the store says what it serves."""

    path: str
    etags: dict[str, str] = field(default_factory=dict)
    headers: dict[str, dict[str, _Stored]] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """For messages."""
        return without_secrets(self.path).rstrip("/")

    def read(self, name: str, limit: int) -> bytes:
        """A small file whole.

        Raises:
            FileNotFoundError: it is not there.
            UserError: it is larger than `limit`, or cannot be fetched.
        """
        content = self._transport().fetch(name, 0, limit + 1)
        if len(content) > limit:
            raise UserError(f"{self.place}/{name}: has more than the {limit:,} bytes that are read; give another file")
        return content

    def keys(self, name: str) -> frozenset[str]:
        """Of the tensors in a file; raises as `read`."""
        return frozenset(self._header(name))

    def tensor_bytes(self, name: str) -> int:
        """Of all tensors in a file, as its header tells; raises as `read`."""
        return sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in self._header(name).values())

    def fetch(self, name: str, parts: Sequence[Part]) -> dict[str, Tensor]:
        """The parts of a file's tensors, by key, in the dtype they are stored in.

        Raises:
            FileNotFoundError: it is not there.
            UserError: a tensor is missing or of another shape, or the file is damaged, replaced or cannot be fetched.
        """
        header, place = self._header(name), f"{self.place}/{name}"
        spans: list[tuple[int, int, memoryview]] = []
        found: dict[str, Tensor] = {}
        for part in parts:
            stored = header.get(part.key)
            if stored is None or stored.shape != part.whole:
                is_what = "is not there" if stored is None else f"is {stored.shape}, expected {part.whole}"
                raise UserError(f"{place}: {part.key} {is_what}; export the model again")
            memory = bytearray(math.prod(part.shape) * stored.dtype.itemsize)
            found[part.key] = torch.frombuffer(memory, dtype=stored.dtype).view(part.shape)
            spans += _spans(part, stored, memoryview(memory))
        spans.sort(key=lambda span: span[0])
        transport = self._transport()

        def fetch(piece: tuple[int, int]) -> bytes:
            raw = transport.fetch(name, piece[0], piece[1] - piece[0])
            if len(raw) < piece[1] - piece[0]:
                raise UserError(f"{place}: ends at byte {piece[0] + len(raw):,}, its header says it is longer")
            return raw

        pieces = [piece for run in joined(spans) for piece in _pieces(*run)]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            _fill(spans, zip(pieces, pool.map(fetch, pieces), strict=True))
        return found

    def _transport(self) -> Transport:
        return Transport(open_store(self.path), Patience(FETCH_S), Meter(), etags=self.etags)

    def _header(self, name: str) -> dict[str, _Stored]:
        if name in self.headers:
            return self.headers[name]
        place, transport = f"{self.place}/{name}", self._transport()
        size = int.from_bytes(transport.fetch(name, 0, 8), "little")
        if size > HEADER_BYTES:
            raise UserError(f"{place}: a header of {size:,} bytes, at most {HEADER_BYTES:,} are read")
        described = parse_json(transport.fetch(name, 8, size), place)
        try:
            self.headers[name] = {key: _stored(value, 8 + size) for key, value in described.items()
                                  if key != "__metadata__"}  # fmt: skip
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{place}: not a safetensors file; export the model again") from None
        return self.headers[name]


def _stored(value: Mapping[str, Any], start: int) -> _Stored:
    """ValueError, or what wrong types lead to, where it is none."""
    dtype, shape = DTYPES[value["dtype"]], tuple(int(size) for size in value["shape"])
    begin, end = value["data_offsets"]
    if min((begin, *shape)) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError
    return _Stored(dtype, shape, start + int(begin))


def _spans(part: Part, stored: _Stored, memory: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """(first byte, end, where they belong) of a part's runs."""
    size, done = stored.dtype.itemsize, 0
    for first, end in part.runs():
        length = (end - first) * size
        if length:
            yield stored.begin + first * size, stored.begin + end * size, memory[done : done + length]
        done += length


def joined(spans: Sequence[tuple[int, int, Any]]) -> list[tuple[int, int]]:
    """(first byte, end) of what is fetched at once, of spans in their order."""
    gaps = np.array([later[0] - earlier[1] for earlier, later in itertools.pairwise(spans)], dtype=np.int64)
    surplus = SURPLUS * sum(end - first for first, end, _ in spans)
    smallest_first = np.argsort(gaps, kind="stable")
    total = np.cumsum(gaps[smallest_first])
    count = max(int(np.searchsorted(total, surplus, side="right")), len(spans) - REQUESTS)
    bridged = np.zeros(len(gaps), dtype=bool)
    bridged[smallest_first[:count]] = True
    runs: list[tuple[int, int]] = []
    for place, (first, end, _) in enumerate(spans):
        if place and bridged[place - 1]:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((first, end))
    return runs


def _pieces(first: int, end: int) -> Iterator[tuple[int, int]]:
    for start in range(first, end, PIECE_BYTES):
        yield start, min(end, start + PIECE_BYTES)


def _fill(spans: Sequence[tuple[int, int, memoryview]], fetched: Iterator[tuple[tuple[int, int], bytes]]) -> None:
    """Puts what came, in the order of the file, where it belongs."""
    place = 0
    for (start, stop), raw in fetched:
        while place < len(spans) and spans[place][0] < stop:
            first, end, memory = spans[place]
            begin, last = max(first, start), min(end, stop)
            memory[begin - first : last - first] = raw[begin - start : last - start]
            if end > stop:
                break
            place += 1
