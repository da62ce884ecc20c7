"""Several documents in one sequence, kept apart.

`documents_BL` numbers the document of every position: non-decreasing along L, equal within a document. What computes
rows of C positions (chunks, or whole sequences) computes a row that b documents begin inside b + 1 times: the row
itself is right for the document it begins in, and each further document has a copy of the row that holds its own inputs
only and starts from nothing. A row without a boundary inside costs what it costs anyway.

Shapes: B batch, L length, C positions of a row, N rows of all sequences, D width, X copies, P positions of the copies'
own documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megassm.errors import UserError
from megassm.ops.transfer import to_device


class Segments(NamedTuple):
    """How documents cut the rows of a batch; the same for every layer."""

    opening_BN: Tensor
    """Document of each row's first position."""
    closing_BN: Tensor
    """Document of each row's last position."""
    tail_BNC: Tensor
    """True at the positions of the document that a row ends in."""
    copied_X: Tensor
    """Of which of the N rows each copy is."""
    own_XC: Tensor
    """True at the positions of the copy's own document."""
    places_P: tuple[Tensor, Tensor]
    """The same positions as (copy, position in its row)."""

    def to(self, device: torch.device) -> Segments:
        """The same on a device. To cut there would wait for it: how many copies there are is a value."""
        copy_P, position_P = self.places_P
        opening, closing, tail, copied, own, copy_P, position_P = (
            to_device(tensor, device) for tensor in (*self[:5], copy_P, position_P)
        )
        return Segments(opening, closing, tail, copied, own, (copy_P, position_P))

    @property
    def has_copies(self) -> bool:
        return self.copied_X.numel() > 0

    def copies(self, u_NCD: Tensor) -> Tensor:
        """The copies' rows (X, C, D), zero outside their own documents."""
        return u_NCD[self.copied_X].where(self.own_XC[..., None], 0)

    def join(self, rows: Tensor, copies: Tensor) -> Tensor:
        """What was computed for the rows (N, C, ..), with what was computed for the copies (X, C, ..) in its place."""
        copy_P, position_P = self.places_P
        return rows.index_put((self.copied_X[copy_P], position_P), copies[copy_P, position_P])


def cut_into_rows(documents_BL: Tensor, row: int, always_copies: bool = False) -> Segments:
    """How documents cut rows of `row` positions; the last row of a sequence may be filled up.

    With `always_copies` there are at least two, of the first row: one is of the document that it begins in, and gives
    what the row gives, as nothing is before it; the other is of none.
    """
    filler = documents_BL[:, -1:].expand(-1, -documents_BL.shape[1] % row)
    rows_BNC = torch.cat((documents_BL, filler), dim=1).view(len(documents_BL), -1, row)
    rows_NC = rows_BNC.flatten(0, 1)
    copied_X, begin_X = (rows_NC[:, 1:] != rows_NC[:, :-1]).nonzero(as_tuple=True)
    own_XC = rows_NC[copied_X] == rows_NC[copied_X, begin_X + 1][:, None]
    if always_copies:
        first_1C = rows_NC[:1] == rows_NC[0, 0]
        copied_X = torch.cat((copied_X.new_zeros(2), copied_X))
        own_XC = torch.cat((first_1C, torch.zeros_like(first_1C), own_XC))
    copy_P, position_P = own_XC.nonzero(as_tuple=True)
    return Segments(
        opening_BN=rows_BNC[..., 0],
        closing_BN=rows_BNC[..., -1],
        tail_BNC=rows_BNC == rows_BNC[..., -1:],
        copied_X=copied_X,
        own_XC=own_XC,
        places_P=(copy_P, position_P),
    )


def document_numbers(ids_BL: Tensor, document_end: int | None) -> Tensor | None:
    """The document of every position, an end being part of what it ends; None where they need not be told apart."""
    if document_end is None:
        return None
    ends_BL = ids_BL == document_end
    return ends_BL.cumsum(1) - ends_BL.long()


def check_documents(documents_BL: Tensor, ids_BL: Tensor) -> None:
    """UserError if `documents_BL` is not a valid numbering for `ids_BL`."""
    if documents_BL.shape != ids_BL.shape:
        raise UserError(
            f"documents of shape {tuple(documents_BL.shape)} for ids of shape {tuple(ids_BL.shape)}: give one number "
            "for every position"
        )
    if bool((documents_BL[:, 1:] < documents_BL[:, :-1]).any()):
        raise UserError("documents: the numbers fall along a sequence; a document is one run of positions, so count up")
