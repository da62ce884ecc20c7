"""The weights that a model starts from: each parameter made by one replica, given to the others, divided at once.

No process ever holds a whole model of float32 numbers, on the host or on the device. A parameter is made in blocks of
its rows, of which the tensor group's ranks keep their parts, in the precision of training; ZeRO-3 keeps a share of
that before the next parameter comes. The replicas divide the work among themselves: the largest parameters first, each
to the one with the least so far, all at the same time.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megassm.model import LanguageModel
from megassm.parallel.background import in_background
from megassm.parallel.tensor import WeightSlice, set_parameter
from megassm.parallel.world import World

WeightSource = Callable[[str], Iterable[Tensor]]
"""The float32 values of a parameter by its name: blocks of its rows, one after another, on the CPU."""
ALONE = 4096
"""A parameter of fewer numbers is made by every replica: a message would cost more."""


def shared_out(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Who of `ranks` has what: the largest first, each to the rank with the least so far."""
    loads = [0] * ranks
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += sizes[name]
    return owner


@torch.no_grad()
def fill(part: Tensor, blocks: Iterable[Tensor], of: WeightSlice) -> None:
    """Writes the part `of` a parameter that comes in blocks of rows; what is not of the part is dropped."""
    first = 0
    for block in blocks:
        last = first + len(block)
        if of.axis != 0:
            part[first:last].copy_(of.of(block))
        else:
            # rows of the part, of those of the block
            begin, end = (min(max(0, -((of.start - row) // of.step)), len(of.indices)) for row in (first, last))
            if begin < end:
                part[begin:end].copy_(block[of.indices[begin] - first :: of.step][: end - begin])
        first = last


def start_weights(
    model: LanguageModel,
    parts: Mapping[str, WeightSlice],
    source: WeightSource,
    world: World,
    settle: Callable[[nn.Parameter], None],
) -> None:
    """Gives a model on the meta device its weights, on the world's device and in `model`'s own dtype.

    All replicas must call it. `settle` is called with each parameter as soon as it has its values.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    dtype = next(model.parameters()).dtype
    ranks, rank = world.replicas.size(), world.replicas.rank()
    owner = shared_out({name: shape.numel() for name, shape in shapes.items()}, ranks)
    alone = [name for name, shape in shapes.items() if ranks == 1 or shape.numel() < ALONE]

    def made(name: str) -> Tensor:
        part = torch.empty(shapes[name], dtype=dtype)
        fill(part, source(name), parts[name])
        return part

    coming = _ahead(made, [name for name in shapes if owner[name] == rank and name not in alone])
    part: Tensor | None
    given: Tensor | None = None
    for name in shapes:
        world.progress.note("weights")
        if name in alone:
            part = made(name).to(world.device)
        else:
            given = next(coming) if owner[name] == rank else None
            part = (
                torch.empty(shapes[name], dtype=dtype, device=world.device) if given is None else given.to(world.device)
            )
            dist.broadcast(part.view(torch.uint8), group=world.replicas, group_src=owner[name])
        settle(set_parameter(model, name, part))
        part = given = None  # before the next one is there


def _ahead(made: Callable[[str], Tensor], names: Sequence[str]) -> Iterator[Tensor]:
    """What `made` gives for each name, made in a thread while others are waited for: this rank's share at most."""
    done: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for name in names:
                done.put(made(name))
        finally:
            done.put(None)

    ended = in_background(work)  # now, not when the first is asked for

    def results() -> Iterator[Tensor]:
        for _ in names:
            part = done.get()
            if part is None:
                ended.result()
                raise AssertionError("a thread that ends early has raised")
            yield part

    return results()
