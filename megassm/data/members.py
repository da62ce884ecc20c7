"""The ids in one member of a shard, whoever made it: .u16, .u32 or .npy."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from megassm.data.shards import MemberLayout, stored_dtype

Ids = npt.NDArray[np.unsignedinteger[Any]]

ID_FORMATS = ("u16", "u32", "npy")


def id_format(suffix: str) -> str:
    """Which of ID_FORMATS a member's suffix means (`tokens.npy` is npy); "" for none."""
    last = suffix.rpartition(".")[2]
    return last if last in ID_FORMATS else ""


def member_ids(content: bytes, layout: MemberLayout) -> Ids:
    """A member's ids; where it holds documents, with the EOD that closes the last.

    Raises:
        ValueError: not the format that the suffix says, or an id outside the vocabulary.
    """
    ids = stored_ids(content, layout)
    if layout.members == "documents" and (ids.size == 0 or ids[-1] != layout.eod):
        ids = np.append(ids, ids.dtype.type(layout.eod))
    return ids


def stored_ids(content: bytes, layout: MemberLayout) -> Ids:
    """The ids that are there; raises as `member_ids`."""
    match id_format(layout.suffix):
        case "npy":
            ids = _npy_ids(content)
        case name:
            ids = np.frombuffer(content, dtype=stored_dtype("u16" if name == "u16" else "u32"))
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < layout.vocab_size:
        raise ValueError(f"ids {ids.min()} to {ids.max()} leave the vocabulary [0, {layout.vocab_size})")
    return ids.astype(stored_dtype(layout.dtype), copy=False)


def _npy_ids(content: bytes) -> npt.NDArray[Any]:
    loaded = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(loaded, np.ndarray) or loaded.ndim != 1 or loaded.dtype.kind not in "iu":
        kind = f"{loaded.dtype} of shape {loaded.shape}" if isinstance(loaded, np.ndarray) else "no array"
        raise ValueError(f"{kind}; it must be integers in one dimension")
    return loaded
