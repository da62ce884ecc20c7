"""How fast the device is, and how fast megassm is on it: rates, shares of the peak, memory against the plan."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megassm.config.load import load_config
from megassm.config.schema import Config
from megassm.cost import parameters, training_flops_per_token
from megassm.eval.measure import timed_seconds
from megassm.model import parameter_shapes
from megassm.ops import head_mixing, mixing
from megassm.ops.mixing import GROUP_BYTES
from megassm.optim import learning_rate
from megassm.parallel.engine import Engine
from megassm.parallel.mesh import mesh_of
from megassm.parallel.start import WeightSource
from megassm.parallel.world import World, join_world, leave_world
from megassm.plan.cluster import filters_of
from megassm.plan.memory import rank_memory
from megassm.run.journal import peak_flops
from megassm.train.profiling import Batches, kind_rows, phase_rows, profile_training, random_batches
from tools.bench.gpu.plan import Found, Plan
from tools.bench.mixer import MixerBenchPlan, bench
from tools.bench.model import transformer_of_equal_size
from tools.bench.roofline import MEMORY_TB_S
from tools.bench.roofline import rows as roofline_rows

CONFIGS = Path(__file__).parents[3] / "configs"
TINY = ("model.vocab_size=257", "model.d_model=64", "model.n_layers=2", "model.seq_len=128", "model.num_channels=8",
        "model.d_ffn=96", "budget.budgets=[2,8]", "eval.budgets=[2,8]", "train.precision=fp32")  # fmt: skip
TINY_HYBRID = ("model.n_layers=4", "model.n_heads=4", "model.n_kv_heads=2")
"""On a processor, where the script itself is tried."""


def machine(plan: Plan, _folder: Path) -> Iterator[Found]:
    """What runs here, and the two ceilings: a large matrix product, and a copy counted as read and written."""
    import platform

    device = torch.device(plan.device)
    cuda = device.type == "cuda"
    versions = {name: _version(name) for name in ("torch", "triton", "deepspeed", "numpy")}
    yield {"python": platform.python_version(), **versions, "cpus": torch.get_num_threads(),
           "device": torch.cuda.get_device_name(device) if cuda else platform.machine()}  # fmt: skip
    rates = {}
    for name, size in (("bfloat16", 8192), ("bfloat16", 4096), ("float32", 4096)) if cuda else (("float32", 512),):
        a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, name)) for _ in range(2))
        seconds = min(timed_seconds(lambda a=a, b=b: a @ b, device, 10))  # type: ignore[misc]
        rates[f"{name} {size}"] = round(2 * size**3 / seconds / 1e12, 1)
    source = torch.empty(2**29 if cuda else 2**22, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = min(timed_seconds(lambda: target.copy_(source), device, 5))
    yield {"tflops": rates, "copy_tb_s": round(2 * source.nbytes / seconds / 1e12, 3)}
    yield {"peak_flops": peak_flops(None, device)}


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _config(plan: Plan, name: str, micro_steps: int, *overrides: str) -> Config:
    """A configuration of the project for one rank, its batch cut to a few micro-steps."""
    own = ["log.wandb=disabled", f"run.dir={plan.folder / name}", "data.path=unused", f"train.device={plan.device}"]
    if plan.device == "cpu":
        own += [*TINY, *(TINY_HYBRID if name.endswith("hybrid") else ()), "train.micro_batch_sequences=2"]
    config = load_config(CONFIGS / f"{name}.yaml", [*own, *overrides], 1)
    batch = micro_steps * config.train.micro_batch_sequences
    return config.model_copy(update={"train": config.train.model_copy(update={"batch_sequences": batch})})


def repeated_noise(config: Config) -> WeightSource:
    """Weights for timing: of the right size, from a million numbers. To draw a billion would take most of the time."""
    noise = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))

    def rows(name: str) -> list[torch.Tensor]:
        shape = parameter_shapes(config.model)[name]
        return [noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape)]

    return rows


def measure(name: str, config: Config, budgets: Sequence[int], repeats: int) -> Iterator[Found]:
    """{name: what is known so far}, more as each K is timed: seconds of a micro-step and of an update, of the first
    update, in which programs are made; the allocator's peak beside the plan's."""
    world = join_world(config)
    cuda = world.device.type == "cuda"
    group_bytes = GROUP_BYTES[world.device.type]
    planned = rank_memory(config, mesh_of(config, 1), filters_of(config), group_bytes, fused=cuda)
    found: Found = {
        "parameters": parameters(config.model, config.model.num_channels),
        "micro_batch": config.train.micro_batch_sequences,
        "recompute": config.train.recompute,
        "zero_stage": config.parallel.zero_stage,
        "planned_gb": round(sum(planned.values()) / 1e9, 3),
    }
    for part in _measured(config, world, budgets, repeats):
        found |= part
        yield {name: found}
    leave_world()
    gc.collect()
    if cuda:
        found["peak_over_plan"] = round(found["peak_gb"] / found["planned_gb"], 3)
        torch.cuda.empty_cache()
    yield {name: found}


def _measured(config: Config, world: World, budgets: Sequence[int], repeats: int) -> Iterator[Found]:
    started = time.perf_counter()
    engine = Engine(config, world, weights=repeated_noise(config))
    found: Found = {"built_s": round(time.perf_counter() - started, 2), "by_k": {}}
    batches = random_batches(config, world.device)
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    tokens = config.train.micro_batch_sequences * config.model.seq_len
    peak, _ = peak_flops(config.log.peak_tflops, world.device)
    updates = []
    for k in budgets:
        begun = time.perf_counter()
        _update_seconds(engine, batches, k)
        first = time.perf_counter() - begun
        timed = [_update_seconds(engine, batches, k) for _ in range(repeats)]
        steps = [s for row in timed for s in row[:-1]]
        seconds = statistics.median(steps)
        updates += [row[-1] for row in timed]
        flops = training_flops_per_token(config.model, k, config.model.seq_len) * tokens
        found["by_k"][str(k)] = {"micro_step_ms": round(1e3 * seconds, 3), "tokens_per_s": round(tokens / seconds),
                                 "mfu": round(flops / seconds / peak, 4) if peak else None,
                                 "fastest_ms": round(1e3 * min(steps), 3), "first_update_s": round(first, 2),
                                 "expected_ms": _expected_ms(config, k, world.device)}  # fmt: skip
        yield found
    found["update_ms"] = round(1e3 * statistics.median(updates), 2)
    if world.device.type == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        found["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 3)
    engine.close()
    yield found


def _expected_ms(config: Config, k: int, device: torch.device) -> float | None:
    """Of a micro-step by `tools.bench.roofline`, where it knows the card."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    card = next((card for card in MEMORY_TB_S if card in name), None)
    return None if card is None else round(float(roofline_rows(config, [k], [card])[0]["expected_ms"]), 2)


def _update_seconds(engine: Engine, batches: Batches, k: int) -> list[float]:
    """Seconds of each micro-step, then of the update; the device is waited for after each."""

    def micro_step() -> None:
        _, objective_BL = engine.training_losses(batches(), k)
        engine.backward(objective_BL, torch.ones_like(objective_BL, dtype=torch.bool))

    def update() -> None:
        engine.update(learning_rate(engine.config.optim, engine.config.train, 0))

    seconds = []
    for part in (*[micro_step] * engine.micro_steps, update):
        begun = time.perf_counter()
        part()
        if engine.world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return seconds


def as_transformer(config: Config) -> Config:
    """Llama's layers (rotary positions, SwiGLU, RMSNorm, torch's attention), as deep and of as many parameters."""
    model = transformer_of_equal_size(config.model)
    return config.model_copy(update={"model": model})


def rates(plan: Plan, _folder: Path, compile_blocks: str = "false") -> Iterator[Found]:
    """Tokens a second and MFU of 350m_hybrid and 125m at all channels and at K = 2, beside transformers of equal size
    in the same loop."""
    repeats = 4 if plan.quick else 10
    configs = {name: _config(plan, name, 2, f"train.compile={compile_blocks}") for name in ("350m_hybrid", "125m")}
    for name, config in configs.items():
        full = config.model.num_channels
        yield from measure(name, config, [full, 2] if plan.quick else [full, 8, 2], repeats)
    for name, config in configs.items():
        yield from measure(f"{name} as a transformer", as_transformer(config), [config.model.num_channels], repeats)


def memory(plan: Plan, _folder: Path) -> Iterator[Found]:
    """The allocator's peak against the plan, of hybrids; and what recomputation costs."""
    names = ("350m_hybrid",) if plan.quick else ("350m_hybrid", "1b_hybrid")
    for name in names:
        for recompute in ("false", "true"):
            config = _config(plan, name, 1, f"train.recompute={recompute}")
            full = config.model.num_channels
            yield from measure(f"{name} recompute={recompute}", config, [2, full], 2 if plan.quick else 5)
        yield from measure(f"{name} as a transformer", as_transformer(config), [config.model.num_channels], 3)


def sizes(plan: Plan, _folder: Path) -> Iterator[Found]:
    """1b_hybrid at every budget of training, by ZeRO stage; a quick one at all channels and at K = 2 of stage 1."""
    for stage in (1,) if plan.quick else (1, 2, 3):
        config = _config(plan, "1b_hybrid", 2, f"parallel.zero_stage={stage}")
        budgets = [config.model.num_channels, 2] if plan.quick else config.listed_budgets()
        yield from measure(f"zero {stage}", config, budgets, 4 if plan.quick else 5)


def mixer(plan: Plan, _folder: Path) -> Iterator[Found]:
    """One spectral layer of 1b_hybrid's width at K = 2, 8, 32, beside attention and the published formulation."""
    cuda = plan.device == "cuda"
    bench_plan = MixerBenchPlan(
        lengths=[2048] if plan.quick else [2048, 16384],
        budgets=[2, 8, 32] if cuda else [2],
        methods=("chunked", "attention", "authors") if cuda else ("chunked", "attention"),
        d_model=1280 if cuda else 32,
        batch=4 if cuda else 1,
        dtype=torch.bfloat16 if cuda else torch.float32,
        device=torch.device(plan.device),
        repeats=5,
    )
    rows: list[dict[str, Any]] = []
    for row in bench(bench_plan, print):
        rows.append({name: float(f"{value:.4g}") if isinstance(value, float) else value
                     for name, value in asdict(row).items()})  # fmt: skip
        yield {"rows": rows}


def heads(plan: Plan, _folder: Path) -> Iterator[Found]:
    """Features, gate and M_k of 1b_hybrid's width by heads of three sizes, forward and backward: features written in
    groups, and by the kernels that write none, where they serve."""
    cuda, device = plan.device == "cuda", torch.device(plan.device)
    n, c, i, d = (128, 64, 108, 2048) if cuda else (2, 8, 12, 32)
    dtype = torch.bfloat16 if cuda else torch.float32
    for width in (64, 128, 256) if cuda else (16,):
        for k in (2, 8, 16) if cuda else (2,):
            rows, dy = (torch.randn(shape, device=device, dtype=dtype) / 10 for shape in ((c, k, i), (n, c, d)))
            z, channels = (torch.randn(shape, device=device, dtype=dtype) for shape in ((n, i, d), (k, d, width)))
            weights, channels = torch.rand(n, c, d // width, k, device=device), channels / width**0.5
            ways = {"groups": mixing._GatedProduct.apply}
            if head_mixing.kernel_serves(z, rows, weights, channels):
                ways["at_once"] = head_mixing.gated_product
            both = partial(head_mixing.product_with_gradients, given=(z, weights, channels), rows_CKI=rows, dy_NCX=dy)
            ms = {name: 1e3 * min(timed_seconds(partial(both, way), device, 5)) for name, way in ways.items()}
            yield {f"P={width} K={k}": {name: float(f"{value:.4g}") for name, value in ms.items()}}


def profile(plan: Plan, folder: Path) -> Iterator[Found]:
    """Where a micro-step of 125m goes: by phase, by kind of layer, by kernel."""
    config = _config(plan, "125m", 1)
    world = join_world(config)
    engine = Engine(config, world, weights=repeated_noise(config))
    batches = random_batches(config, world.device)
    for k in (2, config.model.num_channels):
        found = profile_training(engine, batches, k, 1 if plan.quick else 3, folder / "trace.json.gz")
        yield {f"K={k}": {"phases": phase_rows(found), "kinds": kind_rows(found), "update_ms": 1e3 * found.update_s}}
        yield {f"K={k} kernels": _kernels(engine, batches, k)}
    leave_world()


def _kernels(engine: Engine, batches: Batches, k: int) -> list[list[Any]]:
    """(name, calls, ms) of the kernels, or on a CPU the operations, that take longest in an update."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    cuda = engine.world.device.type == "cuda"
    with torch_profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        _, objective_BL = engine.training_losses(batches(), k)
        engine.backward(objective_BL, torch.ones_like(objective_BL, dtype=torch.bool))
        engine.update(1e-4)
        if cuda:
            torch.cuda.synchronize()
    rows = profiler.key_averages()
    attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = sorted(rows, key=lambda row: -getattr(row, attribute))
    total = sum(getattr(row, attribute) for row in rows) / 1e3
    launches = sum(row.count for row in rows)
    longest = [[row.key[:90], row.count, round(getattr(row, attribute) / 1e3, 3)] for row in rows[:25]]
    return [["all", launches, round(total, 3)], *longest]
