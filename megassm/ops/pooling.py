"""The mean over an example's positions, for a head that classifies sequences (`megassm.data.task`).

    classes + separator:   content .. content | separator | label | padding ..

The id of the separator is the number of classes. What comes after it, the label among it, is hidden from the model.
Shapes: B batch, L length, D width.
"""

from __future__ import annotations

from torch import Tensor


def separators(ids_BL: Tensor, separator: int) -> Tensor:
    """(B, L) where the first separator is: the position that the label follows."""
    found_BL = ids_BL == separator
    return found_BL & (found_BL.cumsum(1) == 1)


def content_positions(ids_BL: Tensor, separator: int) -> Tensor:
    """(B, L) the positions before the first separator."""
    return (ids_BL == separator).cumsum(1) == 0


def pooled(x_BLD: Tensor, content_BL: Tensor) -> Tensor:
    """(B, 1, D) the mean over the content, in float32; 0 where there is none."""
    weights_B1L = content_BL.float() / content_BL.sum(1, keepdim=True).clamp(min=1)
    return (weights_B1L[:, None] @ x_BLD.float()).to(x_BLD.dtype)
