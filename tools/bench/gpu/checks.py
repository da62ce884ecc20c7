"""Values on the device against float64 on the CPU, and each way of computing against another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megassm.config.model import ModelConfig
from megassm.layers.filterbank import FilterBank
from megassm.model import LanguageModel, build_model, losses_at
from megassm.ops import gates, losses, mixing, states, swiglu
from megassm.ops.filterbank import ChunkTables, chunk_inputs
from tools.bench.gpu.plan import Found, Plan

SHAPES = ((3, 108, 96, 200), (1, 1, 1, 1), (5, 65, 130, 64), (2, 128, 64 * 32, 1280), (7, 100, 33, 257))
"""Chunks N, inputs and states I, positions x filters X, width D."""
BOUND = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


def off(found: Tensor, truth: Tensor) -> float:
    """The norm of the difference over that of the truth, in float64."""
    a, b = found.detach().double().cpu(), truth.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def hold(errors: dict[str, float], bounds: dict[str, float]) -> Found:
    wrong = {name: error for name, error in errors.items() if not error < bounds[name]}
    rounded = {name: float(f"{error:.3g}") for name, error in errors.items()}
    return {"errors": rounded, "ok": not wrong, **({"error": f"too far off: {wrong}"} if wrong else {})}


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
    yield hold(errors, bounds)


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
    yield hold(errors, bounds)


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
    yield hold(errors, bounds)


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
    yield hold(errors, bounds)


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
        "selective": {"mixer_heads": 4, "gate": "sigmoid", "selective": True},
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
                wanted = losses_and_gradients(true, ids, 5, document_end)
                found = losses_and_gradients(mine, ids.to(device), 5, document_end)
                errors[f"{name} loss"], errors[f"{name} gradient"] = map(off, found, wanted)
                bounds[f"{name} loss"], bounds[f"{name} gradient"] = bound, 3 * bound
    yield hold(errors, bounds)


def cast_parameters(model: LanguageModel, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def losses_and_gradients(model: LanguageModel, ids: Tensor, k: int, end: int | None) -> tuple[Tensor, Tensor]:
    """Of `ids` (B, T) at budget k (B, L), and of their mean by all parameters, one after the other."""
    losses = losses_at(model, ids, k, end)
    gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
    return losses.detach(), torch.cat([gradient.double().flatten().cpu() for gradient in gradients])


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
    yield hold(errors, dict.fromkeys(errors, 1e-4))
