"""Values on the device against float64 on the CPU, and each way of computing against another."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megassm.config.model import ModelConfig
from megassm.layers.filterbank import FilterBank
from megassm.model import LanguageModel, build_model, losses_at
from megassm.ops import gates, losses, mixing, states, swiglu
from megassm.ops import head_mixing as at_once
from megassm.ops import taps as by_kernel
from megassm.ops.filterbank import ChunkTables, chunk_inputs
from megassm.ops.kernel_check import with_gradients
from tools.bench.gpu.plan import Found, Plan

SHAPES = ((3, 108, 96, 200), (1, 1, 1, 1), (5, 65, 130, 64), (2, 128, 64 * 32, 1280), (7, 100, 33, 257))
"""Chunks N, inputs and states I, positions x filters X, width D."""
HEADS = (
    (16, 8, 96, 9, 64, 108), (2, 8, 128, 40, 64, 108), (16, 8, 256, 5, 64, 100), (8, 4, 16, 3, 64, 128),
    (3, 2, 64, 1, 1, 2), (5, 3, 40, 7, 33, 65), (1, 2, 200, 2, 50, 77),
)  # fmt: skip
"""Channels K, heads, their inputs P, chunks N, positions C, inputs and states I."""
TAPS = ((4, 2, 2048, 768), (4, 3, 150, 70), (3, 2, 33, 130), (8, 1, 5, 64), (2, 1, 1, 1))
"""Taps, sequences, positions, width."""
BOUND = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


def off(found: Tensor, truth: Tensor) -> float:
    """The norm of the difference over that of the truth, in float64."""
    a, b = found.detach().double().cpu(), truth.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def _hold(errors: dict[str, float], bounds: dict[str, float]) -> Found:
    wrong = {name: error for name, error in errors.items() if not error < bounds[name]}
    rounded = {name: float(f"{error:.3g}") for name, error in errors.items()}
    return {"errors": rounded, "ok": not wrong, **({"error": f"too far off: {wrong}"} if wrong else {})}


def case_by_case(cases: Iterable[tuple[str, Callable[[], Found]]]) -> Iterator[Found]:
    """What each case finds and what it warned of, as soon as it is there. One that fails does not hide the others."""
    found: dict[str, Found] = {}
    for name, case in cases:
        begun = time.perf_counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                row = case()
            except Exception as error:  # a compiler's refusal has many types
                row = {"ok": False, "error": f"{type(error).__name__}: {error}"[:400]}
        texts = sorted({str(warning.message)[:300] for warning in said})
        found[name] = row | {"s": round(time.perf_counter() - begun, 2)} | ({"warnings": texts[:5]} if texts else {})
        yield {"cases": found}
    failed = [name for name, row in found.items() if not row["ok"]]
    yield {"ok": not failed, **({"error": f"wrong: {', '.join(failed)}"} if failed else {})}


def compared(parts: Sequence[str], found: Sequence[Tensor], truth: Sequence[Tensor], bound: float) -> Found:
    """The errors by part, and whether all are within the bound."""
    errors = {part: off(mine, true) for part, mine, true in zip(parts, found, truth, strict=True)}
    return _hold(errors, dict.fromkeys(parts, bound))


def head_mixing(plan: Plan, _folder: Path) -> Iterator[Found]:
    """The mixer's product by the kernels that write no feature: whether they are taken, their values and gradients
    against float64, and whether two runs give the same bits."""
    device = torch.device(plan.device)
    kinds = [(torch.bfloat16, sizes) for sizes in HEADS] + [(torch.float16, sizes) for sizes in HEADS[1:3]]
    yield from case_by_case(
        (f"{dtype} K={k} H={h} P={p} N={n} C={c} I={i}", partial(_of_heads, device, dtype, (k, h, p, n, c, i)))
        for dtype, (k, h, p, n, c, i) in kinds
    )


def _of_heads(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> Found:
    k, heads, width, n, c, i = sizes
    noise = torch.Generator().manual_seed(width)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise).to(dtype)

    rows, dy, z = random(c, k, i) / 10, random(n, c, heads * width), random(n, i, heads * width)
    given = [z, torch.rand(n, c, heads, k, generator=noise), random(k, heads * width, width) / width**0.5]
    rows_on, dy_on, *on = (tensor.to(device) for tensor in (rows, dy, *given))
    taken = at_once.kernel_serves(on[0], rows_on, *on[1:])
    way = at_once.gated_product if device.type == "cuda" else mixing.gated_product
    found, again = (with_gradients(partial(_mixed, way, rows_on), on, dy_on) for _ in range(2))
    exact = partial(_mixed, mixing.gated_product, rows.double())
    truth = with_gradients(exact, [tensor.double() for tensor in given], dy.double())
    row = compared(("y", "dz", "dweights", "dM"), found, truth, BOUND[str(dtype).removeprefix("torch.")])
    same = all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    return row | {"taken": taken, "same_bits": same, "ok": row["ok"] and same and taken == (device.type == "cuda")}


def _mixed(way: Callable[..., Tensor], rows: Tensor, z: Tensor, weights: Tensor, channels: Tensor) -> Tensor:
    return way(z, rows, weights, channels)


def taps(plan: Plan, _folder: Path) -> Iterator[Found]:
    """The taps by one kernel each way: whether they are taken, their values and gradients against float64."""
    device = torch.device(plan.device)
    yield from case_by_case(
        (f"{dtype} N={n} B={b} L={length} D={d}", partial(_of_taps, device, dtype, (n, b, length, d)))
        for dtype in (torch.bfloat16, torch.float16)
        for n, b, length, d in TAPS
    )


def _of_taps(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> Found:
    n, b, length, d = sizes
    noise = torch.Generator().manual_seed(d)
    u, weight, dv = (
        torch.randn(shape, generator=noise).to(dtype) for shape in ((b, length, d), (n, d), (b, length, d))
    )
    taken = by_kernel.kernel_serves(u.to(device))
    way = by_kernel.causal_taps if device.type == "cuda" else _convolved
    found = with_gradients(way, [u.to(device), weight.to(device)], dv.to(device))
    truth = with_gradients(_convolved, [u.double(), weight.double()], dv.double())
    row = compared(("v", "du", "dweight"), found, truth, BOUND[str(dtype).removeprefix("torch.")])
    return row | {"taken": taken, "ok": row["ok"] and taken == (device.type == "cuda")}


def _convolved(u: Tensor, weight: Tensor) -> Tensor:
    n, d = weight.shape
    return F.conv1d(F.pad(u.mT, (n - 1, 0)), weight.flip(0).t()[:, None], groups=d).mT


def kernels(plan: Plan, _folder: Path) -> Iterator[Found]:
    """The Triton kernels, forward and backward, and whether the package itself takes them."""
    device = torch.device(plan.device)
    errors: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            form, form_again = mixing._kernels(torch.zeros(1, 108, 1, dtype=dtype, device=device))
        by_triton = form is not mixing.gated_features
        yield {f"triton_{name}": by_triton, f"warnings_{name}": [str(warning.message) for warning in said]}
        for shape in SHAPES:
            n, i, x, d = shape
            noise = torch.Generator().manual_seed(n * x)
            z, rows = torch.randn(n, i, d, generator=noise).to(dtype), torch.randn(x, i, generator=noise).to(dtype) / 10
            weights, gradient = torch.randn(n, x, generator=noise), torch.randn(n, x, d, generator=noise).to(dtype)
            features = rows.double() @ z.double()
            gates = weights.double()[..., None]
            truth = (features * gates, features * gates, (features * gradient.double()).sum(-1))
            on = [tensor.to(device) for tensor in (z, rows, weights, gradient)]
            gradient_on = on[3].clone()
            again, dweights = form_again(on[0], on[1], on[2], gradient_on)
            found = (form(on[0], on[1], on[2]), again, dweights)
            for what, mine, true in zip(("features", "again", "dweights"), found, truth, strict=True):
                errors[f"{name} {what} {shape}"] = off(mine, true)
            errors[f"{name} dfeatures {shape}"] = off(gradient_on, gradient.double() * gates)
            bounds |= {key: BOUND[name] for key in errors if key not in bounds}
    yield _hold(errors, bounds)


def fused(plan: Plan, _folder: Path) -> Iterator[Found]:
    """The recurrence and the loss by one kernel each way: whether they are taken, and their errors against float64."""
    device = torch.device(plan.device)
    errors: dict[str, float] = {}
    bounds: dict[str, float] = {}
    bank = FilterBank(2048, 32, "chunked")
    bank.reset()
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        noise = torch.Generator().manual_seed(2)
        u = torch.randn(2, 2000, 100, generator=noise).to(dtype)
        dz = torch.randn(64, 64 + bank.state_size, 100, generator=noise).to(dtype)
        logits = (3 * torch.randn(100, 32_000, generator=noise)).to(dtype)
        targets, dnll = torch.randint(0, 32_000, (100,), generator=noise), torch.randn(100, generator=noise)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            states_taken = states.kernel_serves(u.to(device), bank.input_SC)
            losses.token_losses(logits.to(device), targets.to(device))
        yield {f"states_{name}": states_taken, f"warnings_{name}": [str(warning.message) for warning in said]}
        exact, tables = bank.tables(torch.float64, 32), bank.tables(dtype, 32)
        own = ChunkTables(tables.transition_SS.to(device), tables.input_SC.to(device), tables.rows_CKI.to(device))
        rounded = exact._replace(input_SC=tables.input_SC.double())
        found = (
            *_grads(partial(_inputs, own), u.to(device), dz.to(device)),
            *_grads(partial(_losses, targets.to(device)), logits.to(device), dnll.to(device)),
        )
        truth = (
            *_grads(partial(_inputs, rounded), u.double(), dz.double()),
            *_grads(partial(_exact_losses, targets), logits.double(), dnll.double()),
        )
        for what, mine, true in zip(("z", "du", "nll", "dlogits"), found, truth, strict=True):
            errors[f"{name} {what}"], bounds[f"{name} {what}"] = off(mine, true), BOUND[name]
    yield _hold(errors, bounds)


def elementwise(plan: Plan, _folder: Path) -> Iterator[Found]:
    """The gate's softmax, SwiGLU and the divergence by one kernel each way: whether it is taken, and its errors."""
    device = torch.device(plan.device)
    errors: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        noise = torch.Generator().manual_seed(3)
        scores, up, dalpha, dy = (3 * torch.randn(2, 300, 96, generator=noise) for _ in range(4))
        student, teacher = (4 * torch.randn(50, 32_000, generator=noise) for _ in range(2))
        dkl = torch.randn(50, generator=noise)
        ways: dict[str, tuple[Callable[..., Tensor], Tensor, list[Tensor], Tensor]] = {
            "gate": (_gate, scores, [], dalpha.view(2, 300, 3, 32)),
            "swiglu": (swiglu.swiglu, scores, [up], dy),
            "divergence": (_divergence, student, [teacher], dkl),
        }
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            taken = gates.kernel_serves(scores.to(device, dtype), 3)
            for what, (way, x, others, gradient) in ways.items():
                own, rest = x.to(dtype), [other.to(dtype) for other in others]
                mine = _grads(partial(_after, way, [other.to(device) for other in rest]), own.to(device),
                              gradient.to(device))  # fmt: skip
                true = _grads(partial(_after, way, [other.double() for other in rest]), own.double(), gradient.double())
                for part, a, b in zip(("", " gradient"), mine, true, strict=True):
                    errors[f"{name} {what}{part}"] = off(a, b)
                    bounds[f"{name} {what}{part}"] = BOUND[name]
        yield {f"gate_{name}": taken, f"warnings_{name}": [str(warning.message) for warning in said]}
    yield _hold(errors, bounds)


def _after(way: Callable[..., Tensor], others: Sequence[Tensor], x: Tensor) -> Tensor:
    return way(x, *others)


def _gate(scores: Tensor) -> Tensor:
    if gates.kernel_serves(scores, 3):
        return gates.weights(scores, 3, gates.Gate.RESCALED)
    return mixing.gate_weights(torch.unflatten(scores, -1, (-1, 3)).transpose(-1, -2), True)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    if student.dtype == torch.float64:
        log_p, log_q = (teacher / 2).log_softmax(-1), (student / 2).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    return losses.divergences(student, teacher, 2.0)


def _inputs(tables: ChunkTables, u: Tensor) -> Tensor:
    return chunk_inputs(u, tables)


def _losses(targets: Tensor, logits: Tensor) -> Tensor:
    return losses.token_losses(logits, targets)


def _exact_losses(targets: Tensor, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _grads(way: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = way(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def filterbank(plan: Plan, _folder: Path) -> Iterator[Found]:
    """`FilterBank.mix` with gradients at several K, lengths and heads, each against float64 on the CPU."""
    device = torch.device(plan.device)
    errors: dict[str, float] = {}
    bounds: dict[str, float] = {}
    bank = FilterBank(1024, 32, "chunked")
    bank.reset()
    on = FilterBank(1024, 32, "chunked")
    on.reset()
    on.to(device)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for k, heads, length in ((1, 1, 1024), (2, 1, 1000), (8, 4, 130), (32, 2, 1024)):
            noise = torch.Generator().manual_seed(k)
            u, channels = torch.randn(2, length, 64, generator=noise), torch.randn(k, 64, 64 // heads, generator=noise)
            weights = torch.rand(2, length, heads, k, generator=noise)
            inputs = [u.to(dtype), weights, channels.to(dtype) / 8]
            mine = [tensor.detach().clone().to(device).requires_grad_() for tensor in inputs]
            true = [tensor.double().clone().requires_grad_() for tensor in inputs]
            y, truth = on.mix(mine[0], mine[1], mine[2]), bank.mix(true[0], true[1], true[2])
            gradient = torch.randn(truth.shape, generator=noise)
            y.backward(gradient.to(y))  # type: ignore[no-untyped-call]
            truth.backward(gradient.double())  # type: ignore[no-untyped-call]
            pairs = [
                ("y", y, truth),
                *((n, a.grad, b.grad) for n, a, b in zip(("u", "w", "M"), mine, true, strict=True)),
            ]
            for what, a, b in pairs:
                assert a is not None
                assert b is not None
                key = f"{name} {what} K={k} H={heads} L={length}"
                errors[key], bounds[key] = off(a, b), BOUND[name]
    yield _hold(errors, bounds)


def model(plan: Plan, _folder: Path) -> Iterator[Found]:
    """Losses and gradients of whole models on the device against the CPU's in float64."""
    device = torch.device(plan.device)
    errors: dict[str, float] = {}
    bounds: dict[str, float] = {}
    base = ModelConfig(vocab_size=300, d_model=64, n_layers=4, seq_len=256, num_channels=8, n_heads=4, d_ffn=96)
    kinds = {
        "spectral": {},
        "hybrid": {"pattern": "SA", "n_kv_heads": 2, "window": 100},
        "heads": {"mixer_heads": 4, "gate": "sigmoid", "input_taps": 3},
    }
    ids = torch.randint(1, 300, (2, 257), generator=torch.Generator().manual_seed(1))
    ids[:, 70:200:41] = 0
    for kind, update in kinds.items():
        config = base.model_copy(update=update)
        for dtype, bound in (("float32", 1e-4), ("bfloat16", 3e-2)):
            for document_end in (None, 0):
                true, mine = build_model(config, 3), build_model(config, 3).to(device)
                cast_parameters(true, torch.float64)
                cast_parameters(mine, getattr(torch, dtype))
                name = f"{kind} {dtype} {'apart' if document_end == 0 else ''}"
                wanted, found = losses_at(true, ids, 5, document_end), losses_at(mine, ids.to(device), 5, document_end)
                wanted.mean().backward()  # type: ignore[no-untyped-call]
                found.mean().backward()  # type: ignore[no-untyped-call]
                errors[f"{name} loss"], bounds[f"{name} loss"] = off(found, wanted), bound
                errors[f"{name} gradient"] = off(_gradient(mine), _gradient(true))
                bounds[f"{name} gradient"] = 3 * bound
    yield _hold(errors, bounds)


def cast_parameters(model: LanguageModel, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _gradient(model: LanguageModel) -> Tensor:
    gradients: Sequence[Tensor] = [p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None]
    return torch.cat(list(gradients))


def decoding(plan: Plan, _folder: Path) -> Iterator[Found]:
    """Token by token equals the parallel form on the device."""
    device = torch.device(plan.device)
    config = ModelConfig(vocab_size=300, d_model=64, n_layers=2, pattern="SA", seq_len=256, num_channels=8, n_heads=4,
                         d_ffn=96)  # fmt: skip
    model = build_model(config, 3).to(device).eval()
    ids = torch.randint(0, 300, (2, 80), device=device)
    with torch.no_grad():
        whole = model(ids, 5)
        logits, state = model.prefill(ids[:, :40], 5)
        errors = {"prefill": off(logits, whole[:, 39])}
        for position in range(40, 80):
            logits, state = model.step(ids[:, position], state, 5)
        errors["step"] = off(logits, whole[:, 79])
    yield _hold(errors, dict.fromkeys(errors, 1e-4))
