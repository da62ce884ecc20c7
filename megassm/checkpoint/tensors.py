"""The tensors of a checkpoint, read in parts as they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megassm.checkpoint.format import AGAIN, Checkpoint, tensor_key
from megassm.guarded import as_tensors
from megassm.model import parameter_shapes
from megassm.parallel.state import Kind


@dataclass(frozen=True)
class CheckedTensor:
    """A tensor of a checkpoint; what is read of it is float32 and finite."""

    checkpoint: Checkpoint
    key: str
    stored: Any

    def __getitem__(self, block: tuple[slice, ...]) -> Tensor:
        """A block of it.

        Raises:
            UserError: it cannot be read, or is not what it must be.
        """
        with as_tensors(self.checkpoint.folder, AGAIN):
            found: Tensor = self.stored[block]
        self.checkpoint.check_values(found, self.key)
        return found


def tensors_of(checkpoint: Checkpoint) -> Callable[[str, Kind], CheckedTensor]:
    """A parameter's weight, moment or average, by name."""
    stored, shapes = checkpoint.stored(), parameter_shapes(checkpoint.config.model)

    def find(name: str, kind: Kind) -> CheckedTensor:
        key = tensor_key(name, kind)
        with as_tensors(checkpoint.folder, AGAIN):
            found = stored(key).get_slice(key)
            if tuple(found.get_shape()) != tuple(shapes[name]):
                raise ValueError(f"{key} is {tuple(found.get_shape())}, expected {tuple(shapes[name])}")
        return CheckedTensor(checkpoint, key, found)

    return find
