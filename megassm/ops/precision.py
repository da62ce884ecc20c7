"""Keeps autocast out of methods that choose their own precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Owner = TypeVar("Owner")
Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def without_autocast(
    method: Callable[Concatenate[Owner, Tensor, Rest], Result],
) -> Callable[Concatenate[Owner, Tensor, Rest], Result]:
    """A method of (self, tensor, ...) that computes in the dtypes of its tensors, also where autocast is on.

    Autocast would round a filter's recurrence, whose errors add up along a sequence, and would change dtypes below
    products that are written into tensors made before.
    """

    @functools.wraps(method)
    def exact(owner: Owner, tensor: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        with torch.autocast(tensor.device.type, enabled=False):
            return method(owner, tensor, *args, **kwargs)

    return exact
