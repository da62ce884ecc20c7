"""A safetensors file, written piece by piece: its checksum is known with its last byte, and it grows on disk. Of a file
that is read, leading parts of tensors.

The package's own writer takes the whole file in one call: a checksum would need to read it again, and whether a slow
disk still takes anything could not be seen.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 24
SYNC_BYTES = 1 << 28
"""So much waits for the disk at most: the end of a large file would else be one long wait."""
ALIGNMENT = 8
"""Of the header's length, as the format has it."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], wrote: Callable[[int], None]) -> tuple[int, int]:
    """Writes float32 tensors in CPU memory to a new file; it is on disk when this returns.

    `wrote` is called with the bytes that each piece has added, once they are written or on disk.

    Returns:
        (size in bytes, CRC-32) of the file.

    Raises:
        OSError: the file is there, or the disk does not take it.
    """
    size = crc = synced = 0
    with path.open("xb") as file:
        for block in _blocks(tensors):
            file.write(block)
            crc = zlib.crc32(block, crc)
            size += len(block)
            if size - synced >= SYNC_BYTES:
                _sync(file.fileno(), file.flush)
                synced = size
            wrote(len(block))
        _sync(file.fileno(), file.flush)
    return size, crc


def _sync(handle: int, flush: Callable[[], None]) -> None:
    flush()
    os.fsync(handle)


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32, f"{name} is {tensor.dtype}"
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        for start in range(0, len(raw), BLOCK_BYTES):
            yield raw[start : start + BLOCK_BYTES]


def leading(file: Any, key: str, whole: torch.Size, kept: torch.Size) -> Tensor:
    """The leading part of shape `kept` of a tensor in an open safetensors file: nothing beyond it is read.

    Raises:
        ValueError: the tensor's shape is not `whole`.
    """
    stored = file.get_slice(key)
    if (found := tuple(stored.get_shape())) != tuple(whole):
        raise ValueError(f"{key} is {found}, expected {tuple(whole)}")
    part: Tensor = stored[tuple(slice(size) for size in kept)]  # a view of the mapped file
    return part.clone(memory_format=torch.contiguous_format)
