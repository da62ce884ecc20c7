"""Blocks as programs of torch.compile, for training.

K is a number of Python's in a block, as is how its filters go through in groups: every budget has a graph of its own,
and of each budget every kind of layer one, which all layers of the kind share. When the listed budgets have been seen,
nothing is compiled again. A graph is whole (a break in it is an error), and the large products and recurrences are
nodes of it that run as they do outside (`megassm.ops.kernel_check.in_compiled_graph`); what the compiler fuses is what
lies between: norms, gates, taps, SwiGLU, rotary positions, residuals.

Validation is not compiled: the gates are listened to there, and a graph does not call a hook that came after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType

from megassm.errors import UserError
from megassm.layers.block import Block
from megassm.ops.documents import Segments
from megassm.ops.kernel_check import compiler_switch


def compile_blocks(blocks: Sequence[Block], budgets: int, backend: str = "inductor") -> None:
    """Compiles each block when it is first called in training at a budget.

    Args:
        blocks: of one model.
        budgets: how many different K there may be.
        backend: of torch.compile.

    Raises:
        UserError: the compiler is switched off.
    """
    import torch._dynamo  # imported where it is used: it takes longer than all of torch

    if switch := compiler_switch():
        raise UserError(
            f"train.compile = true, but the environment variable {switch} = 1 switches torch's compiler off: unset "
            "it, or set train.compile: false"
        )
    kinds = {
        (type(block.mixer), getattr(block.mixer, "sigma_scale", None), *(each.shape for each in block.parameters()))
        for block in blocks
    }
    graphs = 2 * budgets * len(kinds)  # with gradients, and without, as a teacher is
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, graphs)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, graphs)
    plain = Block.computed  # a copy of its code: the compiler keeps programs by code, and these are of this model alone
    own = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__)
    computed = torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
    for block in blocks:
        block.compiled = computed


def of_any_number(segments: Segments) -> Segments:
    """`segments` of at least two copies, so marked that one graph takes any number of them."""
    import torch._dynamo

    for sized in (segments.copied_X, segments.own_XC, *segments.places_P):
        torch._dynamo.mark_dynamic(sized, 0)
    return segments
