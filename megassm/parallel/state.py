"""What a training job must remember, parameter by parameter, in and out of a DeepSpeed engine at any ZeRO stage.

A kind of state is the float32 weight, one of AdamW's moments, or the weight's running average. `held` gives what a
replica holds of it, `write` takes the whole; with all parts put together (`megassm.parallel.collect`) it depends on no
mesh and no stage. DeepSpeed's own checkpoints depend on both: its universal format would need a conversion, and does
not go between stages 1 and 3.

Everything here that begins with an underscore is DeepSpeed's, as 0.19.8 has it; tests/test_resume.py holds every stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

Kind = Literal["weight", "exp_avg", "exp_avg_sq", "ema"]
AVERAGE: Kind = "ema"
"""The weight's running average: a moment to the optimizer's state, so that DeepSpeed divides it as it does those."""
KINDS: tuple[Kind, ...] = get_args(Kind)[:3]
"""Of every run."""
MOMENTS: tuple[Kind, ...] = KINDS[1:]
State = dict[str, dict[Kind, Tensor]]
"""Whole values, by parameter and kind."""
Numbers = Callable[[int, int], Tensor]
"""The numbers [first, last) of a kind of state of this rank's part of a parameter: flat, float32, on the CPU."""
SMALL = 4096
"""A parameter of fewer numbers is read by every rank that keeps it: a message would cost more."""


def divide(zero: Any, parameter: nn.Parameter) -> None:
    """Leaves of a whole parameter this replica's share; `zero` is DeepSpeed's `zero.Init` of the replicas."""
    zero._convert_to_deepspeed_param(parameter)
    parameter.partition()  # type: ignore[attr-defined]


def create_moments(engine: Any, average: bool = False) -> None:
    """Fills AdamW's empty state, as its first step would: so that it can be read and written before that.

    With `average` also the running average of the weights, which begins as they do.
    """
    optimizer = _torch_optimizer(engine)
    for master in _masters(engine):
        optimizer.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }
        if average:
            optimizer.state[master][AVERAGE] = master.detach().clone()
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def add_gradients_in_one_pass(engine: Any) -> None:
    """Has stage 1 in bfloat16 add a gradient to its float32 sum as it is: DeepSpeed makes a float32 copy of it first,
    which is 8 of 18 bytes a number and half of the launches."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups_gradients"):
        return

    @torch.no_grad()
    def add(parameter: nn.Parameter, group: int, place: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        total = optimizer.fp32_groups_gradients[group][place]
        total.add_(parameter.grad.view(total.shape))
        parameter._hp_grad = total  # type: ignore[attr-defined]
        optimizer.fp32_groups_has_gradients[group][place] = True
        if clear_lp_grads:
            parameter.grad.zero_()

    optimizer._update_hp_grad = add


@torch.no_grad()
def average(engine: Any, decay: float) -> None:
    """Moves the running average of the weights by one update: average <- decay * average + (1 - decay) * weight."""
    masters, state = _masters(engine), _torch_optimizer(engine).state
    averages = [state[master][AVERAGE] for master in masters]
    torch._foreach_lerp_(averages, [master.detach() for master in masters], 1 - decay)


def applied_updates(engine: Any) -> int:
    """Updates that AdamW has counted: those that were not skipped."""
    state = _torch_optimizer(engine).state
    return int(next(iter(state.values()))["step"])


def set_applied_updates(engine: Any, count: int) -> None:
    for state in _torch_optimizer(engine).state.values():
        state["step"].fill_(count)


def piece(engine: Any, parameter: Any) -> tuple[int, int]:
    """(first, count): the numbers of this rank's part of a parameter, flat, that `held` gives."""
    match engine.zero_optimization_stage():
        case 0:
            return 0, parameter.numel()
        case 1 | 2:
            mapping = parameter._hp_mapping
            address = None if mapping is None else mapping.lp_fragment_address
            return (0, 0) if address is None else (address.start, address.numel)
        case 3:
            partition, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
            size = parameter.ds_shape.numel()
            first = min(size, partition.numel() * engine.optimizer._get_param_partition_rank(parameter))
            return first, min(size - first, partition.numel())  # shorter on the last rank: partitions are padded
        case stage:
            raise AssertionError(f"stage {stage}")


def held(engine: Any, parameter: Any, kind: Kind) -> Tensor:
    """What this replica holds of a kind of state of its part of a parameter: flat, float32, a view; no message."""
    key = None if kind == "weight" else kind
    match engine.zero_optimization_stage():
        case 0:
            whole = parameter.detach() if key is None else engine.optimizer.state[parameter][key]
            found = whole.flatten()
        case 1 | 2:
            mapping = parameter._hp_mapping
            found = torch.empty(0) if mapping is None else mapping.get_hp_fragment(key).flatten()
        case _:
            partition, _ = engine.optimizer._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=key
            )
            found = partition[: piece(engine, parameter)[1]]
    assert isinstance(found, Tensor)
    return found.detach()


@torch.no_grad()
def write(engine: Any, parameter: nn.Parameter, kind: Kind, numbers: Numbers, replicas: dist.ProcessGroup) -> None:
    """Restores a kind of state: each replica reads what it keeps alone, and its share of what all of them keep.

    All replicas must call it. Call `finish_writing` after the last.
    """
    key = None if kind == "weight" else kind
    match engine.zero_optimization_stage():
        case 0:
            target = parameter if key is None else engine.optimizer.state[parameter][key]
            target.copy_(_gathered(numbers, parameter, replicas))
        case 1 | 2:
            _write_fragment(parameter, key, numbers, replicas)
        case 3:
            _write_partition(engine.optimizer, parameter, key, numbers)
        case stage:
            raise AssertionError(f"stage {stage}")


@torch.no_grad()
def squares(engine: Any, parameter: nn.Parameter, replica: int) -> Tensor:
    """Sums of squares over all axes but the first, of the numbers that this replica counts; without communication.

    Their sum over the replicas is that of the whole parameter: at stage 3 each counts the partition it holds, else the
    first replica counts all.
    """
    if engine.zero_optimization_stage() < 3:
        rows = parameter.flatten(1).double().square().sum(dim=1)
        return rows if replica == 0 else torch.zeros_like(rows)
    shape, held = parameter.ds_shape, parameter.ds_tensor.flatten()  # type: ignore[attr-defined]
    first = held.numel() * engine.optimizer._get_param_partition_rank(parameter)
    mine = held[: max(0, shape.numel() - first)]  # shorter on the last rank: partitions are padded
    row_of = torch.arange(first, first + mine.numel(), device=mine.device) // (shape.numel() // shape[0])
    total = torch.zeros(shape[0], dtype=torch.float64, device=mine.device)
    return total.index_add_(0, row_of, mine.double().square())


def finish_writing(engine: Any) -> None:
    """ZeRO-3 keeps small parameters whole on every rank: they are gathered again."""
    if engine.zero_optimization_stage() == 3:
        persistent = engine.optimizer.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


def _gathered(numbers: Numbers, like: Tensor, replicas: dist.ProcessGroup) -> Tensor:
    """All of a parameter, of which each replica has read a share; on its device."""
    size, ranks = like.numel(), replicas.size()
    if ranks == 1 or size < SMALL:
        return numbers(0, size).to(like.device).view(like.shape)
    share = -(-size // ranks)
    first = min(size, share * replicas.rank())
    mine = numbers(first, min(size, first + share))
    padded = torch.zeros(share, dtype=torch.float32, device=like.device)
    padded[: mine.numel()].copy_(mine)
    whole = torch.empty(share * ranks, dtype=torch.float32, device=like.device)
    dist.all_gather_into_tensor(whole, padded, group=replicas)
    return whole[:size].view(like.shape)


def _write_fragment(parameter: Any, key: str | None, numbers: Numbers, replicas: dist.ProcessGroup) -> None:
    """Of stages 1 and 2: every replica has the weight, one or some a piece of its float32 master and moments."""
    mapping = parameter._hp_mapping
    address = None if mapping is None else mapping.lp_fragment_address
    if key is None:
        whole = _gathered(numbers, parameter, replicas)
        parameter.copy_(whole)
        if address is not None:
            mapping.get_hp_fragment().copy_(whole.flatten()[address.start : address.start + address.numel])
    elif address is not None:
        mapping.get_hp_fragment(key).copy_(numbers(address.start, address.start + address.numel))


def _write_partition(zero: Any, parameter: Any, key: str | None, numbers: Numbers) -> None:
    partition, _ = zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    size = parameter.ds_shape.numel()
    first = min(size, partition.numel() * zero._get_param_partition_rank(parameter))
    mine = numbers(first, min(size, first + partition.numel()))  # shorter on the last rank: partitions are padded
    partition[: mine.numel()].copy_(mine)
    if key is None:
        parameter.ds_tensor.data[: mine.numel()].copy_(mine)


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    optimizer = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def _masters(engine: Any) -> list[Tensor]:
    """The float32 tensors that the optimizer updates: parameters, or this rank's flat share of them."""
    if engine.zero_optimization_stage() == 0:
        return list(engine.module.parameters())
    names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
    for name in names:  # stages 1 and 2; stage 1 in bfloat16; stage 3
        masters = getattr(engine.optimizer, name, None)
        if masters is not None:
            return list(masters)
    raise AssertionError(f"{type(engine.optimizer)} has none of {names}")
