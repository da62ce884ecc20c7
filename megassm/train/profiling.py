"""Where the time of an update goes: by phase, and by kind of layer, forward and backward.

    phase     seconds between marks around what the training loop does, the device waited for; not under the profiler
    kind      own time of every operation (on CUDA that of its kernels) under torch.profiler. A forward operation
              belongs to the innermost marked module around it; one of the backward pass to the kind of the forward
              operation that autograd numbered alike, or, where activations are computed again, to the module around it

The marks are hooks put on from outside; the layers know of none.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from megassm.budget import budget_at
from megassm.config.schema import Config
from megassm.cost import LayerKind, forward_flops_by_kind
from megassm.data.dataset import Dataset
from megassm.data.stream import TokenStream
from megassm.layers.block import Block
from megassm.layers.spectral import SpectralMixer
from megassm.model import LanguageModel
from megassm.optim import learning_rate
from megassm.parallel.device import to_device
from megassm.parallel.engine import Engine
from megassm.train.setup import stream_plan

PHASES = ("data", "forward", "backward", "update")
MARK = "megassm: "
"""Begins the name of every range of ours in a trace."""
GRADIENT_SUMS = "gradient sums"
OTHER = "other"
BACKWARD_NODE = "autograd::engine::evaluate_function: "

BACKWARD_SCOPE = 1
"""Of a profiled operation, torch's RecordScope::BACKWARD_FUNCTION."""

Batches = Callable[[], Tensor]
"""Ids (B, L + 1) of the next micro-batch, on the device."""


class KindRow(NamedTuple):
    """Time of one kind of layer in an update, seconds."""

    kind: str
    forward_s: float
    backward_s: float
    forward_flops: float
    """Model FLOPs (`megassm.cost`) of the update's forward passes; the backward pass has twice as many."""


@dataclass
class Profile:
    """What `profile_training` measured, means over updates."""

    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    """Seconds an update."""
    kinds: list[KindRow] = field(default_factory=list)
    update_s: float = 0.0
    """Of the profiled update, under no kind: the optimizer."""


def random_batches(config: Config, device: torch.device) -> Batches:
    """Micro-batches of uniformly drawn tokens, made on the CPU as those of a data set are."""
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = (config.train.micro_batch_sequences, config.model.seq_len + 1)
    return lambda: to_device(torch.randint(0, config.model.vocab_size, shape, generator=generator).numpy(), device)


def data_batches(data: Dataset, engine: Engine, updates: int) -> Batches:
    """The micro-batches that training would read for its first updates, from its own data set."""
    stream = TokenStream(data.train, stream_plan(engine.config, engine.world))
    batches = stream.batches(0, updates)
    return lambda: to_device(next(batches).ids_BT, engine.world.device)


def profile_training(engine: Engine, batches: Batches, k: int | None, steps: int, trace: Path) -> Profile:
    """Makes 2 * steps + 1 updates: one to warm up, `steps` timed by phase, `steps` under the profiler.

    Args:
        engine: as training has it; its weights change.
        batches: see `Batches`.
        k: the budget; None draws each update's as training does after its start.
        trace: where torch's trace goes, for chrome://tracing or Perfetto; a name that ends in .gz is compressed.
    """
    config, result = engine.config, Profile()
    first = config.full_budget_steps()
    budgets = [[k or budget_at(config, first + step, micro) for micro in range(engine.micro_steps)]
               for step in range(steps)]  # fmt: skip
    _update(engine, batches, budgets[0], {})
    for drawn in budgets:
        _update(engine, batches, drawn, result.phases)
    result.phases = {name: seconds / steps for name, seconds in result.phases.items()}
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (engine.world.device.type == "cuda")
    with marked_layers(engine.model), profile(activities=activities, acc_events=True) as profiler:
        for drawn in budgets:
            _update(engine, batches, drawn, {})
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    forward, backward = seconds_by_kind(list(profiler.events() or ()), engine.world.device.type == "cuda")
    flops = _flops_by_kind(config, [drawn for step in budgets for drawn in step])
    result.update_s = forward.pop("update", 0.0) / steps
    result.kinds = [
        KindRow(kind, forward.get(kind, 0.0) / steps, backward.get(kind, 0.0) / steps, flops.get(kind, 0.0) / steps)
        for kind in (*flops, GRADIENT_SUMS, OTHER)
        if forward.get(kind, 0.0) or backward.get(kind, 0.0)
    ]
    return result


def _flops_by_kind(config: Config, budgets: Sequence[int]) -> dict[str, float]:
    """Of the forward passes of micro-steps at these budgets."""
    tokens = config.train.micro_batch_sequences * config.model.seq_len
    total: dict[str, float] = defaultdict(float)
    for k in budgets:
        for kind, flops in forward_flops_by_kind(config.model, k, config.model.seq_len).items():
            total[kind] += flops * tokens
    return total


def _update(engine: Engine, batches: Batches, budgets: Sequence[int], phases: dict[str, float]) -> None:
    """One update as `megassm.train.loop` makes it; adds to the seconds of each phase."""
    device = engine.world.device

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        started = time.perf_counter()
        with record_function(f"{MARK}{name}"):
            yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        phases[name] = phases.get(name, 0.0) + time.perf_counter() - started

    for k in budgets:
        with phase("data"):
            ids_BT = batches()
        with phase("forward"):
            _, objective_BL = engine.training_losses(ids_BT, k)
        with phase("backward"):
            engine.backward(objective_BL, torch.ones_like(objective_BL, dtype=torch.bool))
    with phase("update"):
        engine.update(learning_rate(engine.config.optim, engine.config.train, 0))


@contextmanager
def marked_layers(model: LanguageModel) -> Iterator[None]:
    """Ranges named by kind around every layer's forward pass, and around what the model itself does beside them."""
    handles = [handle for module, kind in _kinds(model) for handle in _mark(module, kind)]
    own: dict[str, LayerKind] = {
        "embed": "embedding", "token_losses": "head and loss", "divergences": "head and loss"
    }  # fmt: skip
    try:
        for name, kind in own.items():
            setattr(model, name, _within(kind, getattr(model, name)))
        yield
    finally:
        for name in own:
            delattr(model, name)
        for handle in handles:
            handle.remove()


def _kinds(model: LanguageModel) -> Iterator[tuple[nn.Module, LayerKind]]:
    yield model.head_norm, "norm"
    for block in cast(list[Block], model.blocks):
        yield block.mixer, "spectral mixer" if isinstance(block.mixer, SpectralMixer) else "attention"
        yield block.ffn, "feed-forward"
        yield block.mixer_norm, "norm"
        yield block.ffn_norm, "norm"


def _mark(module: nn.Module, kind: LayerKind) -> list[Any]:
    ranges = ExitStack()

    def enter(_module: nn.Module, _inputs: object) -> None:
        ranges.enter_context(record_function(f"{MARK}{kind}"))

    def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
        ranges.close()

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def _within(kind: str, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def marked(*arguments: Any) -> Tensor:
        with record_function(f"{MARK}{kind}"):
            return method(*arguments)

    return marked


def seconds_by_kind(events: Sequence[Any], cuda: bool) -> tuple[dict[str, float], dict[str, float]]:
    """(forward, backward) seconds by kind; the optimizer's are under "update" of the first. Data are left out."""
    on_cpu = [event for event in events if event.device_type.name == "CPU"]
    kind_of_number: dict[tuple[int, int], tuple[float, str]] = {}
    for event in on_cpu:
        kind = _enclosing(event)[0]
        key = (event.thread, event.sequence_nr)
        later = key not in kind_of_number or kind_of_number[key][0] <= event.time_range.start
        if kind and event.sequence_nr >= 0 and event.scope != BACKWARD_SCOPE and later:
            kind_of_number[key] = event.time_range.start, kind
    totals: tuple[dict[str, float], dict[str, float]] = defaultdict(float), defaultdict(float)
    for event in on_cpu:
        kind, phase, node = _enclosing(event)
        if phase == "data" or (phase == "" and node is None):
            continue
        if phase == "update":
            kind = "update"
        elif not kind and node is not None:
            number = (node.fwd_thread, node.sequence_nr)
            summed = node.name.startswith(f"{BACKWARD_NODE}torch::autograd::AccumulateGrad")
            kind = GRADIENT_SUMS if summed else kind_of_number.get(number, (0, OTHER))[1]
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        totals[int(phase == "backward" or node is not None)][kind or OTHER] += own / 1e6
    return totals


def _enclosing(event: Any) -> tuple[str, str, Any]:
    """(the innermost kind around an operation, the phase, the node of the backward pass that it is part of)."""
    kind, phase, node = "", "", None
    while event is not None:
        if event.name.startswith(MARK):
            name = event.name.removeprefix(MARK)
            if name in PHASES:
                phase = name
            elif node is None:
                kind = kind or name
        elif node is None and not kind and event.name.startswith(BACKWARD_NODE):
            node = event
        event = event.cpu_parent
    return kind, phase, node


def phase_rows(result: Profile) -> list[Mapping[str, Any]]:
    """The table by phase."""
    total = sum(result.phases.values()) or 1.0
    return [{"phase": name, "ms": 1e3 * s, "share": f"{s / total:.1%}"} for name, s in result.phases.items()]


def kind_rows(result: Profile) -> list[Mapping[str, Any]]:
    """The table by kind of layer; shares are of forward and backward passes together."""
    total = sum(row.forward_s + row.backward_s for row in result.kinds) or 1.0

    def giga(flops: float, seconds: float) -> float | str:
        return flops / seconds / 1e9 if flops and seconds else ""

    return [
        {
            "layer": row.kind,
            "forward ms": 1e3 * row.forward_s,
            "backward ms": 1e3 * row.backward_s,
            "share": f"{(row.forward_s + row.backward_s) / total:.1%}",
            "forward GFLOP/s": giga(row.forward_flops, row.forward_s),
            "backward GFLOP/s": giga(2 * row.forward_flops, row.backward_s),
        }
        for row in result.kinds
    ]
