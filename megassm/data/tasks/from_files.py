"""Classification of users' own files, byte by byte: texts, images, and Long Range Arena's Pathfinder.

    text         .jsonl with "text" and "label" a line, or a folder that holds a folder of text files a label
    image        a folder of image files a label; images.npy (N, H, W[, 3]) and labels.npy (N,), unsigned bytes; or
                 the batches of CIFAR-10 for Python. Colours become grey (ITU-R BT.601), a pixel is a token
    pathfinder   one difficulty of the published folders: metadata/*.npy, which are lines of text
                 "FOLDER FILE _ LABEL ..", and the images they name

A text that is too long is cut; an image must fit. What is read is shuffled, by a hash of (seed, its number).
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, assert_never, cast

import numpy as np
import numpy.typing as npt

from megassm.data.dataset import TRAIN, VALID
from megassm.data.order import hash_order
from megassm.data.task import Example, Task, fitting
from megassm.errors import UserError, install_hint
from megassm.files import open_given
from megassm.guarded import Described, check_inside, confined, parse_json, read_bytes, validated

Kind = Literal["text", "image", "pathfinder"]
Pixels = npt.NDArray[np.uint8]

TEXT_LENGTH = 4096
GREY = np.array([0.299, 0.587, 0.114])
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP")
"""By content. Of the others that Pillow knows some start programs: PostScript does."""
MAX_PIXELS = 2**24
TEXT_LINE_BYTES = 2**26
CIFAR_BYTES = 2**26
CIFAR_OPERATIONS, CIFAR_CLASSES = 10**6, 2**16
UNUSED = frozenset({"EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ", "PERSID", "BINPERSID"})
"""Operations of a pickle that no batch of CIFAR-10 needs."""


class Item(NamedTuple):
    """One example before it is read."""

    label: str
    load: Callable[[], bytes]


@dataclass(frozen=True)
class Labelled:
    """Where labelled examples are."""

    kind: Kind
    inputs: Sequence[Path]
    valid_inputs: Sequence[Path] | None = None
    """For validation; None takes `valid_fraction` of the others."""
    valid_fraction: float = 0.1
    labels: Sequence[str] | None = None
    """The classes, in order; None: as found. Examples of other labels are left out."""


def labelled_task(source: Labelled, length: int | None, seed: int) -> tuple[Task, dict[str, Iterable[Example]]]:
    """(the task, its splits' examples, read as they are asked for).

    Raises:
        UserError: nothing is there, or something is not what it should be.
    """
    train = shuffled(items(source.kind, source.inputs), seed)
    if source.valid_inputs is not None:
        valid = shuffled(items(source.kind, source.valid_inputs), seed)
    else:
        held = max(1, round(source.valid_fraction * len(train)))
        train, valid = train[held:], train[:held]
    known = train if source.valid_inputs else train + valid
    labels = tuple(source.labels or sorted({item.label for item in known}))
    if source.labels is None and (others := {item.label for item in valid} - set(labels)):
        raise UserError(f"--valid-input: labels {sorted(others)} are not in --input; give --labels to leave them out")
    if len(labels) < 2:
        raise UserError(f"--input: labels {list(labels)}: a task needs two at least")
    if length is None:
        length = TEXT_LENGTH if source.kind == "text" else fitting(len(train[0].load()))
    task = Task(source.kind, length, labels, tuple(byte_name(byte) for byte in range(256)))
    return task, {TRAIN: _examples(task, train), VALID: _examples(task, valid)}


def byte_name(byte: int) -> str:
    return chr(byte) if 0x20 < byte < 0x7F else f"x{byte:02x}"


def shuffled(found: list[Item], seed: int) -> list[Item]:
    return [found[number] for number in hash_order(len(found), seed)]


def items(kind: Kind, places: Sequence[Path]) -> list[Item]:
    """All examples of files and folders, in a fixed order.

    Raises:
        UserError: there are none.
    """
    found: list[Item] = []
    for place in places:
        if not place.exists():
            raise UserError(f"{place}: no such file or folder")
        match kind:
            case "text":
                found += _texts(place)
            case "image":
                found += _images(place)
            case "pathfinder":
                found += _pathfinder(place)
            case _:
                assert_never(kind)
    if not found:
        raise UserError(f"{', '.join(map(str, places))}: holds no labelled {kind}; --help says how it should look")
    return found


def _examples(task: Task, found: Sequence[Item]) -> Iterator[Example]:
    classes = {label: number for number, label in enumerate(task.answers)}
    for item in found:
        if item.label in classes:
            content = item.load()
            content = content[: task.content_length] if task.is_text else content
            ids = np.frombuffer(content, dtype=np.uint8).astype(np.int64) + task.first_symbol
            yield Example(ids, np.array([classes[item.label]]))


def _texts(place: Path) -> Iterator[Item]:
    if place.is_file():
        with open_given(place) as file:
            for number, line in enumerate(iter(lambda: file.readline(TEXT_LINE_BYTES + 1), b""), 1):
                yield _labelled_line(line, f"{place}:{number}")
        return
    for label, path in _by_label(place):
        yield Item(label, partial(_beginning, path))


def _beginning(path: Path) -> bytes:
    with open_given(path) as file:
        return file.read(min(TEXT_LINE_BYTES, os.fstat(file.fileno()).st_size))


def _labelled_line(line: bytes, place: str) -> Item:
    way_out = 'a line is {"text": "..", "label": ".."}'
    if len(line) > TEXT_LINE_BYTES:
        raise UserError(f"{place}: longer than {TEXT_LINE_BYTES:,} bytes; {way_out}")
    row = validated(_LabelledLine, parse_json(line, place, way_out), place, way_out)
    try:
        return Item(str(row.label), partial(bytes, row.text.encode()))
    except UnicodeEncodeError as error:  # half of a character, written as \\ud83d
        raise UserError(f"{place}: the text has U+{ord(row.text[error.start]):04X}, which is no character") from None


class _LabelledLine(Described):
    text: str
    label: str | int | bool


def _by_label(folder: Path) -> Iterator[tuple[str, Path]]:
    """(label, file) of a folder of folders."""
    for labelled in sorted(path for path in folder.iterdir() if path.is_dir()):
        for path in sorted(labelled.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                yield labelled.name, path


def _images(place: Path) -> Iterator[Item]:
    if place.is_file():
        yield from _cifar_batch(place)
    elif (place / "images.npy").exists():
        images, labels = (_array(place / name) for name in ("images.npy", "labels.npy"))
        sizes = images.shape[1:3] if images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3) else (0,)
        fitting_labels = labels.shape == images.shape[:1] and labels.dtype.kind in "biuSU" and labels.dtype.itemsize
        if images.dtype != np.uint8 or not 0 < np.prod(sizes, dtype=float) <= MAX_PIXELS or not fitting_labels:
            what = f"{images.dtype} {images.shape} with labels {labels.dtype} {labels.shape}"
            rule = f"it must be uint8 (N, H, W) or (N, H, W, 3), at most {MAX_PIXELS:,} pixels, and labels (N,)"
            raise UserError(f"{place}/images.npy: is {what}; {rule}")
        for image, label in zip(images, labels.tolist(), strict=True):
            yield Item(str(label), partial(_grey, image))
    elif batches := sorted(place.glob("data_batch_*")):
        for batch in batches:
            yield from _cifar_batch(batch)
    else:
        for label, path in _by_label(place):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                yield Item(label, partial(_image_file, path))


def _array(path: Path) -> npt.NDArray[Any]:
    try:
        open_given(path).close()
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=2**14)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give arrays as numpy.save writes them") from None
    except Exception as error:  # of many types, whatever the header leads numpy to
        raise UserError(f"{path}: not an array ({type(error).__name__}: {error})") from None
    return found


def _cifar_batch(path: Path) -> Iterator[Item]:
    try:
        batch = _CifarUnpickler(io.BytesIO(_cifar_bytes(path)), encoding="bytes").load()
        labels, (shape, content) = batch[b"labels"], batch[b"data"].state[1::3]
        images = np.frombuffer(content, np.uint8).reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
        if not all(type(label) is int and 0 <= label < CIFAR_CLASSES for label in labels):
            raise ValueError("a label is no small number")
        if shape != (len(labels), 3072):
            raise ValueError(f"its array is not ({len(labels)}, 3072), as many as its labels")
    except UserError:
        raise
    except Exception as error:  # a pickle can lead to any
        raise UserError(f"{path}: not a batch of CIFAR-10 for Python ({type(error).__name__}: {error})") from None
    for image, label in zip(images, labels, strict=True):
        yield Item(str(label), partial(_grey, image))


def _cifar_bytes(path: Path) -> bytes:
    """The file, if it holds nothing but the operations that a batch is made of: none allocates more than it brings."""
    content = read_bytes(path, CIFAR_BYTES)
    for number, (operation, _, place) in enumerate(pickletools.genops(content)):
        if operation.proto > 2 or operation.name in UNUSED or number > CIFAR_OPERATIONS:
            raise ValueError(f"{operation.name} at byte {place}")
    return content


class _Array:
    """Stands for an array and its type: keeps what the pickle says of it, so that numpy is not led by a stranger."""

    state: Any = ()

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _CifarUnpickler(pickle._Unpickler):  # in Python: the one in C allocates what a number in the file says
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: text.encode("latin-1")  # how protocol 2 writes bytes
        if module.partition(".")[0] == "numpy" and name in ("dtype", "ndarray", "_reconstruct"):
            return _Array
        raise pickle.UnpicklingError(f"asks for {module[:80]}.{name[:80]}")

    def load_setitem(self) -> None:
        value = self.stack.pop()
        self._put([self.stack.pop(), value])

    def load_setitems(self) -> None:
        self._put(self.pop_mark())

    def _put(self, items: list[Any]) -> None:
        """Keys are texts: a tuple of tuples of the same tuples takes for ever to be hashed."""
        if type(self.stack[-1]) is not dict or not all(isinstance(key, bytes | str) for key in items[::2]):
            raise pickle.UnpicklingError("a key that is no text")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _Array):
            raise pickle.UnpicklingError("gives a state to what is no array")
        state = self.stack.pop()
        self.stack[-1].__setstate__(state)

    dispatch = {  # noqa: RUF012
        **pickle._Unpickler.dispatch,
        pickle.SETITEM[0]: cast(Any, load_setitem),
        pickle.SETITEMS[0]: cast(Any, load_setitems),
        pickle.BUILD[0]: cast(Any, load_build),
    }


def _pathfinder(place: Path) -> Iterator[Item]:
    for listing in sorted(place.glob("metadata/*.npy"), key=lambda path: (len(path.stem), path.stem)):
        for number, line in enumerate(read_bytes(listing, TEXT_LINE_BYTES).decode(errors="replace").splitlines(), 1):
            fields = line.split()
            if len(fields) < 4:
                raise UserError(f"{listing}:{number}: {line[:200]!r} is not FOLDER FILE NUMBER LABEL ..")
            image = place / confined(f"{fields[0]}/{fields[1]}", f"{listing}:{number}")
            check_inside(image, place)
            yield Item(fields[3], partial(_image_file, image))


def _image_file(path: Path) -> bytes:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UserError(f"{path}: image files need Pillow; {install_hint('images')}") from None
    try:
        with open_given(path) as file, Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path}: {image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are read")
            return _grey(np.asarray(image.convert("RGB")))
    except UserError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def _grey(image: Pixels) -> bytes:
    """Row by row, a byte a pixel."""
    grey = image if image.ndim == 2 else np.round(image[..., :3] @ GREY)
    return grey.astype(np.uint8).tobytes()
