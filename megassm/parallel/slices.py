"""A part of a stored tensor, read as it is needed: the numbers that one rank keeps, and hardly any other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megassm.parallel.tensor import WeightSlice

Block = tuple[slice, ...]


class StoredTensor(Protocol):
    """A whole tensor in a file."""

    def __getitem__(self, block: Block) -> Tensor:
        """A block of it, float32, on the CPU; slices have no step."""


def flat_blocks(shape: Sequence[int], first: int, last: int) -> Iterator[Block]:
    """The numbers [first, last) of a tensor in the order of its rows, as blocks of it, one after another: at most two
    for each axis."""
    if first >= last:
        return
    if len(shape) == 1:
        yield (slice(first, last),)
        return
    inner = math.prod(shape[1:])
    row, begin = divmod(first, inner)
    end_row, end = divmod(last, inner)
    if row == end_row:
        yield from ((slice(row, row + 1), *block) for block in flat_blocks(shape[1:], begin, end))
        return
    if begin:
        yield from ((slice(row, row + 1), *block) for block in flat_blocks(shape[1:], begin, inner))
        row += 1
    if row < end_row:
        yield (slice(row, end_row), *(slice(0, size) for size in shape[1:]))
    yield from ((slice(end_row, end_row + 1), *block) for block in flat_blocks(shape[1:], 0, end))


def read_flat(stored: StoredTensor, part: WeightSlice, shape: Sequence[int], first: int, last: int) -> Tensor:
    """The numbers [first, last) of a tensor rank's part, which is `part` of the stored tensor and of `shape`; flat."""
    pieces = [_read(stored, part, block).flatten() for block in flat_blocks(shape, first, last)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0)


def _read(stored: StoredTensor, part: WeightSlice, block: Block) -> Tensor:
    """A block of the part."""
    if part.axis is None:
        return stored[block]
    indices = part.indices[block[part.axis]]  # of the whole tensor
    axis, span = part.axis, slice(indices[0], indices[-1] + 1)
    found = stored[(*block[:axis], span, *block[axis + 1 :])]
    return found if part.step == 1 else found[(*(slice(None),) * axis, slice(None, None, part.step))]
