"""Files that others made, read with limits: one reader for each kind. None can be made to run code, to fill the memory
or to end in a traceback.

What is refused is a `UserError` that names the file and the limit. The limits are far above what megassm itself writes;
docs/security.md lists them. JSON lines are read in `megassm.run.records`, which passes over lines that are not records.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from megassm.errors import UserError
from megassm.files import open_given

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from ruamel.yaml.nodes import Node

JSON_BYTES = 2**28
"""Of a JSON file; an index of a million shards has 200 MB."""
JSON_DEPTH = 64
LINE_BYTES = 2**22
"""Of a line of metrics.jsonl or events.jsonl."""
YAML_BYTES = 2**17
YAML_DEPTH = 20
YAML_VALUES = 20_000
"""Values of a YAML file once its aliases are written out."""
TOKENIZER_BYTES = 2**28
MAX_VOCABULARY = 2**24
NPZ_EXPANSION = 8
"""How many times larger than its file an npz may be: that of a data set is not packed at all."""
TAR_HEADER_BYTES = 2**20
"""Of a long name or of PAX's attributes of one member."""
NAME_IN_FOLDER = re.compile(r"[^\x00-\x1f\x7f-\x9f\\]+")

_MANY_DASHES = re.compile(rf"(?m)^[ \t]*(?:[-?][ \t]+){{{YAML_DEPTH}}}")

T = TypeVar("T")


class Described(BaseModel):
    """What a file of JSON must be; keys of later versions are passed over, types are not bent."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


def read_bytes(path: Path, limit: int, way_out: str = "give another file") -> bytes:
    """A regular file of at most `limit` bytes.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it is larger, no file, or cannot be read.
    """
    try:
        with open_given(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(limit, size) + 1)  # python makes room for as much as is asked for
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {way_out}") from None
    if len(content) > limit:
        raise UserError(f"{path}: has {size:,} bytes, at most {limit:,} are read; {way_out}")
    return content


def parse_json(raw: bytes | str, place: object, way_out: str = "give another file") -> Any:
    """The value of a JSON text.

    Raises:
        UserError: not JSON, not UTF-8, or nested more than `JSON_DEPTH` deep.
    """
    try:
        value = json.loads(raw)
        if _may_be_deep(raw):
            _check_depth(value)
    except RecursionError:
        raise UserError(f"{place}: nested more than {JSON_DEPTH} deep; {way_out}") from None
    except ValueError as error:
        raise UserError(f"{place}: not JSON: {_short(error)}; {way_out}") from None
    return value


def parse_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None if the line holds none."""
    if len(line) > LINE_BYTES:
        return None
    try:
        value = parse_json(line, "line")
    except UserError:
        return None
    return value if isinstance(value, dict) else None


def validated(kind: type[T], value: Any, place: object, way_out: str = "give another file") -> T:
    """`value`, read from JSON, as a `kind`.

    Raises:
        UserError: it is not valid; names every entry that is missing or wrong.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise UserError(f"{place}: {problems(error)}; {way_out}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: {_short(error)}; {way_out}") from None


def problems(error: ValidationError, most: int = 3) -> str:
    """The first mistakes, each with its entry."""
    found = error.errors(include_url=False, include_context=False)
    told = [f"{'.'.join(map(str, each['loc']))[:80] or 'the whole'}: {each['msg']}" for each in found[:most]]
    return "; ".join(told) + (f" and {len(found) - most} more" if len(found) > most else "")


def read_json(path: Path, kind: type[T], way_out: str = "give another file", limit: int = JSON_BYTES) -> T:
    """A file of JSON as a `kind`: a pydantic model, or any type that pydantic knows.

    Raises:
        FileNotFoundError: it is not there.
        UserError: it is too large, not JSON, or not what is expected.
    """
    return validated(kind, parse_json(read_bytes(path, limit, way_out), path, way_out), path, way_out)


def compose_yaml(text: str) -> Node | None:
    """The nodes of a YAML text, whose aliases may be written out without harm.

    Raises:
        YAMLError, or ValueError with the limit that is exceeded.
    """
    from ruamel.yaml import YAML

    if len(text) > YAML_BYTES:
        raise ValueError(f"{len(text):,} characters, at most {YAML_BYTES:,} are read")
    if _deepest(text) > YAML_DEPTH or _MANY_DASHES.search(text):
        raise ValueError(f"nested too deeply: more than {YAML_DEPTH} deep")  # ruamel's time grows with the square of it
    try:
        root: Node | None = YAML(typ="safe", pure=True).compose(text)
        if root is not None and (values := _values_below(root, {}, 0)) > YAML_VALUES:
            raise ValueError(f"{values:,} values with its aliases written out, at most {YAML_VALUES:,} are read")
    except RecursionError:
        raise ValueError(f"nested too deeply: more than {YAML_DEPTH} deep, or an alias of itself") from None
    except (AttributeError, TypeError, IndexError, KeyError, AssertionError) as error:  # ruamel's own, on odd input
        raise ValueError(f"not YAML ({type(error).__name__})") from None
    return root


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; raises as `compose_yaml`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    compose_yaml(text)
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise
    except Exception as error:  # a tag whose value is not of its type
        raise ValueError(f"not YAML ({type(error).__name__})") from None


def confined(name: str, place: object) -> str:
    """The name of a file inside a folder, as another file tells it.

    Raises:
        UserError: it is absolute, leaves the folder, or holds control characters.
    """
    parts = name.split("/")
    if not NAME_IN_FOLDER.fullmatch(name) or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"{place}: names the file {name[:200]!r}, which does not lie in its folder; it is not opened")
    return name


def check_inside(path: Path, folder: Path) -> None:
    """UserError if `path` leads out of `folder` by symbolic links."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: is a link that leads out of {folder}; put the file there itself")


def load_columns(raw: bytes, dtypes: Mapping[str, np.dtype[Any]], place: object) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an npz file, each in one dimension, of the type given, and all of one length.

    Raises:
        UserError: not such a file; or it unpacks to more than `NPZ_EXPANSION` times its size.
    """
    columns = load_arrays(io.BytesIO(raw), len(raw), place)
    if missing := [name for name in dtypes if name not in columns]:
        raise UserError(f"{place}: has no {', '.join(missing)}")
    for name, dtype in dtypes.items():
        found = columns[name]
        if found.ndim != 1 or found.dtype != dtype or len(found) != len(next(iter(columns.values()))):
            raise UserError(
                f"{place}: {name} is {found.dtype} {found.shape}; expected {dtype} in one dimension, all alike"
            )
    return columns


def load_arrays(file: IO[bytes], size: int, place: object) -> dict[str, npt.NDArray[Any]]:
    """All arrays of an npz file of `size` bytes, by name.

    Raises:
        UserError: not such a file; or it unpacks to more than `NPZ_EXPANSION` times its size.
    """
    try:
        with zipfile.ZipFile(file) as packed:
            unpacked = sum(entry.file_size for entry in packed.infolist())
            if unpacked > NPZ_EXPANSION * size:
                limit = f"{NPZ_EXPANSION} times its {size:,}"
                raise UserError(f"{place}: unpacks to {unpacked:,} bytes, at most {limit} are read")
            return {name.removesuffix(".npy"): load_npy(packed.read(name)) for name in packed.namelist()}
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy raise whatever the bytes lead them to
        raise UserError(f"{place}: not a file of arrays ({type(error).__name__}: {_short(error)})") from None


def load_npy(raw: bytes) -> npt.NDArray[Any]:
    """An array as .npy holds it, no larger than its bytes.

    Raises:
        ValueError: it is not an array.
    """
    from numpy.lib import format as npy

    try:
        return npy.read_array(io.BytesIO(raw), allow_pickle=False, max_header_size=2**14)
    except Exception as error:  # of many types, whatever the header leads numpy to
        raise ValueError(f"not an array ({type(error).__name__}: {_short(error)})") from None


def open_tensors(path: Path, way_out: str) -> Any:
    """A safetensors file, open, its header checked by that package; UserError if it is not one."""
    from safetensors import safe_open

    with as_tensors(path, way_out):
        return safe_open(path, framework="pt")


@contextmanager
def as_tensors(path: Path, way_out: str) -> Iterator[None]:
    """What that package raises becomes a `UserError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read as tensors ({_short(error)}); {way_out}") from None


def check_tar(file: IO[bytes], size: int) -> None:
    """Walks the headers of a tar file of `size` bytes, from its start; the file is at any place afterwards.

    Raises:
        ValueError: a header is damaged, or makes more of the file than is in it: a sparse member, attributes larger
            than `TAR_HEADER_BYTES`, a member that goes beyond the end.
    """
    offset = 0
    while offset + tarfile.BLOCKSIZE <= size:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            return
        try:
            entry = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(f"offset {offset}: {error}") from None
        end = offset + tarfile.BLOCKSIZE + -(-max(0, entry.size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if entry.type == tarfile.GNUTYPE_SPARSE:
            raise ValueError(f"offset {offset}: a sparse member, which is not read")
        if entry.size < 0 or end > size + tarfile.BLOCKSIZE:
            raise ValueError(f"offset {offset}: a member of {entry.size:,} bytes goes beyond the end at {size:,}")
        if entry.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
            _check_attributes(file, entry.size, offset)
        elif entry.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK) and entry.size > TAR_HEADER_BYTES:
            raise ValueError(f"offset {offset}: a name of {entry.size:,} bytes, at most {TAR_HEADER_BYTES:,} are read")
        offset = end


def _check_attributes(file: IO[bytes], size: int, offset: int) -> None:
    if size > TAR_HEADER_BYTES:
        raise ValueError(f"offset {offset}: attributes of {size:,} bytes, at most {TAR_HEADER_BYTES:,} are read")
    if re.search(rb"\d+ (GNU\.sparse\.|size=)", file.read(size)):
        raise ValueError(f"offset {offset}: attributes give a member another size than its header, which is not read")


def _deepest(text: str) -> int:
    """How many brackets are open at once, those in quoted text and comments among them."""
    deepest = depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def _may_be_deep(raw: bytes | str) -> bool:
    if isinstance(raw, str):
        return raw.count("[") + raw.count("{") > JSON_DEPTH
    return raw.count(b"[") + raw.count(b"{") > JSON_DEPTH


def _check_depth(value: Any) -> None:
    """RecursionError if a value is nested more than `JSON_DEPTH` deep."""
    level = [value]
    for _ in range(JSON_DEPTH + 1):
        level = [item for each in level if isinstance(each, dict | list)
                 for item in (each.values() if isinstance(each, dict) else each)]  # fmt: skip
        if not level:
            return
    raise RecursionError


def _values_below(node: Node, counted: dict[int, int], depth: int) -> int:
    """Values of a node with its aliases written out; RecursionError if they are nested more than `YAML_DEPTH` deep."""
    from ruamel.yaml.nodes import MappingNode, SequenceNode

    if depth > YAML_DEPTH:
        raise RecursionError
    if id(node) in counted:
        if counted[id(node)] < 0:
            raise RecursionError  # an alias of itself
        return counted[id(node)]
    counted[id(node)] = -1
    below: list[Node] = []
    if isinstance(node, MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, SequenceNode):
        below = node.value
    counted[id(node)] = 1 + sum(_values_below(part, counted, depth + 1) for part in below)
    return counted[id(node)]


def _short(error: object) -> str:
    return " ".join(str(error).split())[:200]
