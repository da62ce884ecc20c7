"""A process on a null CUDA device: torch's dispatcher, allocator and groups as on a GPU; its kernels do nothing.

Started by tests/test_nullcuda.py as `python -m tests.nullcuda PART OUT [ARGUMENT ...]`, with the null device's library
preloaded; what PART returns is written to OUT. Values mean nothing there. What shows is where tensors lie, who waits
for the device, what is launched and copied, how many bytes are touched and allocated.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megassm.config.load import load_config, world_size_from_environment
from megassm.config.schema import Config
from megassm.model import parameter_shapes
from megassm.ops.mixing import GROUP_BYTES
from megassm.parallel.device import to_device
from megassm.parallel.engine import Engine
from megassm.parallel.mesh import mesh_of
from megassm.parallel.world import join_world, leave_world
from megassm.plan.cluster import filters_of
from megassm.plan.memory import host_memory, rank_memory, start_memory
from tests.conftest import ROOT
from tests.ranks import first_of

COUNTERS = ("launches", "gemm", "nccl", "stream_sync", "dev_sync", "ev_sync", "h2d", "d2h", "badgrid")
UNTOUCHED = ("empty", "detach", "_unsafe_view", "alias", "set_", "resize_", "lift_fresh", "_reshape_alias", "is_pinned",
             "record_stream", "new_empty", "empty_like", "empty_strided", "_pin_memory")  # fmt: skip
"""Operations that read and write no memory of the device, beside views."""
ONLY_WRITTEN = ("copy_", "zero_", "fill_", "normal_")
TWICE = ("gradient_ptr",)
"""Arguments of Triton kernels that are read and written."""


def device_counts() -> dict[str, int]:
    """What the library has counted so far."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    return {name: ctypes.c_long.in_dll(library, f"null_{name}").value for name in COUNTERS}


class Launches:
    """What Triton kernels would have launched: nothing compiles or loads them here."""

    number, nbytes, flops, bad_grids = 0, 0, 0.0, 0

    @classmethod
    def so_far(cls) -> tuple[int, int, float, int]:
        return cls.number, cls.nbytes, cls.flops, cls.bad_grids


def launched(kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool = False, **keywords: Any) -> None:
    """In the place of Triton's launcher."""
    tensors = dict(zip(kernel.arg_names, arguments, strict=False))
    tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    assert all(tensor.is_cuda and tensor.is_contiguous() for tensor in tensors.values()), (kernel, tensors)
    Launches.number += 1
    Launches.bad_grids += not 0 < grid[0] < 2**31 or any(not 0 < size < 2**16 for size in grid[1:])
    Launches.nbytes += sum(tensor.nbytes * (1 + (name in TWICE)) for name, tensor in tensors.items())
    if "channels_ptr" in tensors or "dchannels_ptr" in tensors:  # megassm.ops.head_mixing
        Launches.flops += mixing_flops(tensors)
    elif "rows_ptr" in tensors:
        Launches.flops += 2.0 * tensors["rows_ptr"].shape[0] * tensors["z_ptr"].numel()
    if "change_ptr" in tensors:
        chunks, _, width = (tensors["z_ptr"] if "z_ptr" in tensors else tensors["dz_ptr"]).shape
        Launches.flops += 2.0 * (tensors["change_ptr"].numel() + tensors["input_ptr"].numel()) * chunks * width


def mixing_flops(tensors: dict[str, Tensor]) -> float:
    """Of the products of one of the three kernels of `megassm.ops.head_mixing_triton`."""
    positions, channels, _ = tensors["rows_ptr"].shape
    chunks, inputs, width = tensors["z_ptr"].shape
    outputs = (tensors["channels_ptr"] if "channels_ptr" in tensors else tensors["dchannels_ptr"]).shape[-1]
    features = 2 * inputs if "dz_ptr" in tensors else inputs  # made, and the gradient carried back
    return 2.0 * chunks * positions * channels * width * (features + outputs)


class Target:
    """In the place of Triton's driver: what is compiled for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def fused(kernel: Any, *arguments: Any, stream: int, **keywords: Any) -> None:
    """In the place of the launcher of what torch's compiler fuses; its code is written, not compiled."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    assert all(tensor.is_cuda for tensor in tensors), (kernel, tensors)
    Launches.number += 1
    Launches.nbytes += sum(tensor.nbytes for tensor in tensors)


def prepare() -> None:
    """Makes this process run where values mean nothing: no kernel is asked whether it is right."""
    import triton

    from megassm.ops import flex, gates, head_mixing, losses, mixing, states, swiglu, taps

    triton.runtime.jit.JITFunction.run = launched
    if os.environ.get("TORCHDYNAMO_DISABLE") != "1":
        from torch._inductor.runtime import triton_helpers
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        triton.runtime.driver.set_active(Target())
        triton_helpers.set_driver_to_gpu = lambda: None
        CachingAutotuner.precompile = lambda self, *arguments, **keywords: None
        CachingAutotuner.run = fused
    mixing._triton_is_right = lambda device, dtype: True
    head_mixing._is_right = lambda device, dtype, width, outputs: True
    flex._is_right = lambda device, dtype, head_dim: True
    for module in (gates, losses, states, swiglu, taps):
        module._is_right = lambda device, dtype: True
    from megassm.train import health

    health.warnings_of = lambda records: []  # of the scores
    torch.backends.cuda.enable_cudnn_sdp(False)  # the library has no cuDNN
    import deepspeed  # noqa: F401

    for module in list(sys.modules.values()):  # ranks' numbers, which no message has carried
        if module is not None and hasattr(module, "assert_ints_same_as_other_ranks"):
            module.assert_ints_same_as_other_ranks = lambda ints: None


class Watch(TorchDispatchMode):
    """Bytes of device memory that operations touch, by operation; copies to the device, and those from pinned memory.

    Each input is read once and each output written once: what a cache saves, or a kernel reads again, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: Counter[str] = Counter()
        self.pinned: set[int] = set()
        self.pinned_copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "_pin_memory":
            self.pinned.add(out.untyped_storage().data_ptr())
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            self.pinned_copies += (
                source.device.type == "cpu" and out.is_cuda and source.untyped_storage().data_ptr() in self.pinned
            )
        if name not in UNTOUCHED and not func.is_view:
            self.nbytes[name] += touched(func, name, args, kwargs, out)
        return out


def touched(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    writes = {
        argument.name for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write
    }
    written = _tensors([given[name] for name in writes if name in given])
    read = _tensors(
        [value for key, value in given.items() if not (key in writes and (key == "out" or name in ONLY_WRITTEN))]
    )
    made = {place: size for place, size in _tensors(out).items() if place not in written}
    if name == "embedding":  # the rows that are asked for
        read = made | _tensors(args[1])
    return sum(sum(tensors.values()) for tensors in (read, written, made))


def _tensors(values: Any) -> dict[tuple[int, int], int]:
    """Bytes on the device by place; an expanded tensor has those of its storage."""
    found = [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.is_cuda]
    return {(x.data_ptr(), x.numel()): min(x.nbytes, x.untyped_storage().nbytes()) for x in found}


def measured(work: Callable[[], object]) -> dict[str, Any]:
    """What `work` launches, waits for, copies and touches. It is done twice: to count FLOPs takes operations apart."""
    before, before_triton = device_counts(), Launches.so_far()
    with Watch() as watch:
        work()
    found = {name: value - before[name] for name, value in device_counts().items()}
    launches, nbytes, triton_flops, bad_grids = (
        now - then for now, then in zip(Launches.so_far(), before_triton, strict=True)
    )
    with FlopCounterMode(display=False) as flops:
        work()
    by_operation = watch.nbytes + Counter({"triton": nbytes})
    return {
        "launches": found["launches"] + found["gemm"] + launches,
        "of these matrix products": found["gemm"],
        "of these Triton's": launches,
        "device syncs": found["dev_sync"] + found["stream_sync"] + found["ev_sync"],
        "copies to the device": found["h2d"],
        "of these from pageable memory": found["h2d"] - watch.pinned_copies,
        "copies to the host": found["d2h"],
        "illegal grids": found["badgrid"] + bad_grids,
        "TFLOP": (flops.get_total_flops() + triton_flops) / 1e12,
        "GB touched": by_operation.total() / 1e9,
        "GB by operation": {name: size / 1e9 for name, size in by_operation.most_common(12)},
    }


def launches_of(work: Callable[[], object]) -> int:
    """What `work` launches, whoever makes it: no operation is looked at."""

    def so_far() -> int:
        counts = device_counts()
        return counts["launches"] + counts["gemm"] + Launches.number

    before = so_far()
    work()
    return so_far() - before


def compiled(name: str, *overrides: str) -> dict[str, Any]:
    """Launches of a micro-step at two budgets, as the layers make them and by compiled blocks; graphs, and breaks."""
    from torch._dynamo.utils import counters

    found: dict[str, Any] = {}
    for way, compiles in (("by layers", "false"), ("compiled", "true")):
        config = shipped(name, 1, *overrides, f"train.compile={compiles}")
        with engine_of(config, 1) as engine:
            ks = (2, config.model.num_channels)
            for k in ks:
                update(engine, k)
            before = counters["stats"]["unique_graphs"]
            found[way] = {str(k): launches_of(lambda k=k: micro_step(engine, k)) for k in ks}
            found["made again"] = counters["stats"]["unique_graphs"] - before
    return found | {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}


def shipped(name: str, size: int, *overrides: str) -> Config:
    """A configuration of the project on `size` ranks, its batch cut to two micro-steps."""
    own = ("log.wandb=disabled", "data.path=unused", "run.dir=unused", "train.device=cuda", *overrides)
    config = load_config(ROOT / f"configs/{name}.yaml", own, size)
    batch = 2 * config.train.micro_batch_sequences * mesh_of(config, size).data
    return config.model_copy(update={"train": config.train.model_copy(update={"batch_sequences": batch})})


def nothing(config: Config) -> Callable[[str], Iterator[Tensor]]:
    """Weights of zeros, in blocks of rows: to draw them takes minutes, and no value arrives."""

    def rows(name: str) -> Iterator[Tensor]:
        shape = parameter_shapes(config.model)[name]
        some = max(1, 2**22 // max(1, shape.numel() // shape[0]))
        for first in range(0, shape[0], some):
            yield torch.zeros(min(some, shape[0] - first), *shape[1:])

    return rows


def micro_step(engine: Engine, k: int) -> None:
    """As `megassm.train.loop.accumulate` makes it, the copies of the batch included."""
    config, mesh = engine.config, engine.world.mesh
    length = config.model.seq_len // mesh.sequence
    ids_BT = np.zeros((config.train.micro_batch_sequences, length + 1), dtype=np.int64)
    mask_BL = to_device(ids_BT[:, 1:] == 0, engine.world.device)
    nll_BL, objective_BL = engine.training_losses(torch.from_numpy(ids_BT), k)
    (nll_BL.detach() * mask_BL).sum()
    engine.backward(objective_BL, mask_BL)


def update(engine: Engine, k: int) -> None:
    for _ in range(engine.micro_steps):
        micro_step(engine, k)
    engine.update(1e-4)


@contextmanager
def engine_of(config: Config, size: int) -> Iterator[Engine]:
    world = join_world(config) if size == 1 else first_of(config, size, torch.device("cuda", 0))
    end = 7 if config.data.isolate_documents else None
    engine = Engine(config, world, weights=nothing(config), document_end=end)
    try:
        yield engine
    finally:
        engine.close()
        leave_world()
        gc.collect()
        torch.cuda.empty_cache()


def count(name: str, size: str, *overrides: str) -> dict[str, Any]:
    """A micro-step of a configuration at its smallest and its largest budget, and its memory beside the plan's."""
    config = shipped(name, int(size), *overrides)
    plan = rank_memory(config, mesh_of(config, int(size)), filters_of(config), GROUP_BYTES["cuda"])
    with engine_of(config, int(size)) as engine:
        started = torch.cuda.max_memory_allocated()
        update(engine, config.model.num_channels)
        torch.cuda.reset_peak_memory_stats()
        update(engine, config.model.num_channels)
        peak = torch.cuda.max_memory_allocated()
        by_k = {}
        for k in sorted({2, 8, config.model.num_channels}):
            update(engine, k)
            by_k[str(k)] = measured(lambda k=k: micro_step(engine, k))  # both micro-steps of an update
            engine.update(1e-4)
    return {
        "planned GB": {kind: size / 1e9 for kind, size in plan.items()},
        "planned peak GB": sum(plan.values()) / 1e9,
        "peak GB": peak / 1e9,
        "planned start GB": start_memory(config, mesh_of(config, int(size))) / 1e9,
        "start GB": started / 1e9,
        "by K": by_k,
    }


class Zeros:
    """A tensor of a checkpoint."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def __getitem__(self, block: tuple[slice, ...]) -> Tensor:
        whole = torch.empty(self.shape, device="meta")
        return torch.zeros(whole[block].shape)


def start(name: str, size: str, *overrides: str) -> dict[str, Any]:
    """The first rank of a large job starts, makes an update, copies its state and resumes: what its device and its
    host hold at most."""
    config, ranks = shipped(name, int(size), *overrides), int(size)
    shapes = parameter_shapes(config.model)
    numbers = [shape.numel() for shape in shapes.values()]
    before = peak_host_bytes()
    engine = Engine(config, first_of(config, ranks, torch.device("cuda", 0)))
    found = {"start GB": torch.cuda.max_memory_allocated() / 1e9, "host start GB": (peak_host_bytes() - before) / 1e9}
    update(engine, config.model.num_channels)
    found["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    kept = engine.read_state(engine.kinds)
    found["copied GB"] = sum(tensor.nbytes for kinds in kept.values() for tensor in kinds.values()) / 1e9
    del kept
    engine.write_state(lambda name, kind: Zeros(shapes[name]), 1)
    plan = rank_memory(config, engine.world.mesh, filters_of(config), GROUP_BYTES["cuda"])
    return found | {
        "host GB": (peak_host_bytes() - before) / 1e9,
        "parameters": sum(numbers),
        "share GB": 2 * sum(numbers) / ranks / 1e9,
        "largest parameter GB": 2 * max(numbers) / 1e9,
        "planned start GB": start_memory(config, engine.world.mesh) / 1e9,
        "planned peak GB": sum(plan.values()) / 1e9,
        "planned host GB": {what: size / 1e9 for what, size in host_memory(config, engine.world.mesh).items()},
    }


def peak_host_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def train(data: str, folder: str, runs: str) -> dict[str, Any]:
    """Trains each of `runs` for two updates and continues it for two: (name, its overrides, those it is continued with,
    the port of each)."""
    from megassm.run.records import read_records
    from tools.bench.gpu.training import SMALL

    common = (*SMALL, "train.max_skipped=1000", f"data.path={data}", "train.precision=bf16", "train.device=cuda",
              "eval.every_steps=2", "optim.warmup_steps=1")  # fmt: skip
    steps, resumed = {}, []
    for name, own, others, ports in json.loads(runs):
        rows = []
        for until, overrides, port in ((2, own, ports[0]), (4, others, ports[1])):
            os.environ["MASTER_PORT"] = str(port)
            where = (f"run.dir={Path(folder) / name}", f"train.steps={until}")
            overrides = [*common, *where, *overrides]
            config = load_config(ROOT / "configs/tiny.yaml", overrides, world_size_from_environment())
            pretrain(config)
            rows.append(read_records(Path(config.run.dir)))
        steps[name] = [row["step"] for row in rows[1]]
        resumed += [name] if [row["step_s"] for row in rows[1][:2]] == [row["step_s"] for row in rows[0]] else []
    return {"steps": steps, "resumed": resumed, "illegal grids": device_counts()["badgrid"] + Launches.bad_grids}


def pretrain(config: Config) -> None:
    from megassm.data.dataset import open_dataset
    from megassm.run.opening import open_run_directory
    from megassm.train import loop

    data = open_dataset(config)
    lock = open_run_directory(config)
    loop.pretrain(config, data)
    if lock is not None:
        lock.close()


def command(name: str, *arguments: str) -> dict[str, Any]:
    """A command of the package."""
    from megassm import __main__

    sys.argv = ["megassm", name, *arguments]
    __main__.main()
    return {}


def main() -> None:
    part, out, *arguments = sys.argv[1:]
    prepare()
    found = {"count": count, "compiled": compiled, "start": start, "train": train, "command": command}[part](*arguments)
    Path(out).write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what a real driver would take down at the end is not there


if __name__ == "__main__":
    main()
