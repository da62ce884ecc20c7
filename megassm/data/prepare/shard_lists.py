"""The index.json that MosaicML's streaming and litdata write beside their shards: which files belong to the set.

A shard that the list names and that is not there would be missing in silence, and one that is there twice, packed and
unpacked, or that another run has left, would be read as more.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megassm.data.prepare.sample_shards import NO_NAMES, Columns
from megassm.data.prepare.unpack import split_packing
from megassm.errors import UserError
from megassm.guarded import parse_json, read_bytes

LIST_NAME = "index.json"
LIST_BYTES = 1 << 28
MAKE_AGAIN = "fetch the whole set again"


class ListedShard(NamedTuple):
    """A shard that a list names."""

    samples: int
    size: int | None = None  # bytes on disk, where the list says
    packing: str | None = None


class ShardList(NamedTuple):
    """What a folder's index.json says."""

    kind: Literal["mds", "litdata"]
    shards: dict[str, ListedShard]  # by name
    columns: Columns | None = None  # of litdata


def shard_list(folder: Path) -> ShardList | None:
    """The list in a folder; None where there is none, or an index.json that is something else.

    Raises:
        UserError: it is such a list, and damaged or of a kind that is not read.
    """
    path = folder / LIST_NAME
    try:
        status = path.stat()
    except OSError:
        return None
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, _mtime_ns: int, size: int) -> ShardList | None:
    if size > LIST_BYTES:
        return None
    try:
        found = parse_json(read_bytes(path, LIST_BYTES), path)
    except UserError:
        return None
    if not isinstance(found, dict):
        return None
    shards, chunks, config = found.get("shards"), found.get("chunks"), found.get("config")
    try:
        if isinstance(shards, list) and shards and all(shard.get("format") == "mds" for shard in shards):
            return ShardList("mds", dict(_mds_shard(path, shard) for shard in shards))
        if isinstance(chunks, list) and isinstance(config, dict) and "data_format" in config:
            packing = _litdata_packing(path, config)
            sizes = {_name(chunk["filename"]): int(chunk["chunk_size"]) for chunk in chunks}
            entries = {name: ListedShard(samples, None, packing) for name, samples in sizes.items()}
            return ShardList("litdata", entries, _litdata_columns(path, config))
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged list of shards: {error!r}; {MAKE_AGAIN}") from None
    return None


def check_all_there(folder: Path) -> None:
    """UserError where a shard that the folder's list names is not there, or has another size."""
    found = shard_list(folder)
    for name, shard in found.shards.items() if found else ():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: no such file, and {LIST_NAME} beside it names it; {MAKE_AGAIN}")
        size = path.stat().st_size
        if shard.size not in (None, size):
            raise UserError(f"{path}: {size} bytes, and {LIST_NAME} beside it says {shard.size}; {MAKE_AGAIN}")


def _name(name: Any) -> str:
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{name!r} is no file's name")
    return name


def _mds_shard(path: Path, shard: Any) -> tuple[str, ListedShard]:
    """The unpacked file where it is there, else the packed one."""
    samples, raw, packed = int(shard["samples"]), shard["raw_data"], shard.get("zip_data")
    name = _name(raw["basename"])
    if packed is None or (path.parent / name).is_file():
        return name, ListedShard(samples, int(raw["bytes"]))
    name = _name(packed["basename"])
    packing = split_packing(name)[1]
    if packing is None:
        rule = f"its shards are packed with {shard.get('compression')}"
        raise UserError(f"{path}: {rule}, which is not read; unpack them")
    return name, ListedShard(samples, int(packed["bytes"]), packing)


def _litdata_packing(path: Path, config: Any) -> str | None:
    if config.get("encryption"):
        raise UserError(f"{path}: its chunks are encrypted; write them without")
    compression, level = config.get("compression"), config.get("compression_level") or "chunk"
    if config.get("ipc_compression") or (compression and level != "chunk"):
        rule = "its samples are compressed within the chunks"
        raise UserError(f"{path}: {rule}, which is not read; write them with compression_level='chunk', or without")
    if compression and not str(compression).startswith("zstd"):
        raise UserError(f"{path}: its chunks are packed with {compression}, which is not read; write them without")
    return "zstd" if compression else None


def _litdata_columns(path: Path, config: Any) -> Columns:
    formats = tuple(map(str, config["data_format"]))
    names = _names(config.get("data_spec"), len(formats))
    if names is None:
        rule = f"its samples are {config.get('data_spec')}"
        raise UserError(f"{path}: {rule}; one text or array, or a dict of such, is read")
    flat = config.get("item_loader") == "TokensLoader"
    return Columns(names, formats, (None,) * len(formats), has_sizes=not flat)


def _names(spec: Any, count: int) -> tuple[str, ...] | None:
    """The names of columns in litdata's account of a sample."""
    if count == 1 and not isinstance(spec, str):
        return NO_NAMES
    [_, tree] = parse_json(str(spec), LIST_NAME)
    children = tree["children_spec"]
    if tree["type"] is None and count == 1:
        return NO_NAMES
    if tree["type"] != "builtins.dict" or any(child["children_spec"] for child in children):
        return None
    names = tuple(map(str, parse_json(tree["context"], LIST_NAME)))
    return names if len(names) == count else None
