"""Training through the launcher's entry point: every kind of run, saved, resumed, and compared with itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megassm.run.records import read_records
from tools.bench.gpu.plan import Found, Plan

ROOT = Path(__file__).parents[3]
STEPS = 12
SMALL = (
    "model.vocab_size=257", "model.d_model=64", "model.n_layers=2", "model.seq_len=128", "model.num_channels=8",
    "model.d_ffn=96", "model.n_heads=4", "budget.strategy=uniform", "budget.draws=2", "optim.warmup_steps=2",
    f"train.steps={STEPS}", "train.batch_sequences=8", "train.micro_batch_sequences=2", "eval.sequences=8",
    "eval.budgets=[1,2,8]", "log.wandb=disabled", "log.every_steps=1", f"checkpoint.every_steps={STEPS // 2}",
    "parallel.timeout_s=120",
)  # fmt: skip
HYBRID = ("model.pattern=SA", "model.n_kv_heads=2", "model.window=50")
HEADS = ("model.mixer_heads=4", "model.gate=sigmoid", "model.input_taps=3")
ARMS: dict[str, Sequence[str]] = {
    "zero0": ("parallel.zero_stage=0", "train.precision=fp32"),
    "zero1": ("parallel.zero_stage=1",),
    "zero2": ("parallel.zero_stage=2",),
    "zero3": ("parallel.zero_stage=3",),
    "fp32": ("train.precision=fp32",),
    "hybrid": HYBRID,
    "documents": (*HYBRID, "data.isolate_documents=true"),
    "recompute": (*HYBRID, "train.recompute=true", "parallel.zero_stage=2"),
    "distill": ("budget.distill_weight=0.5", "parallel.zero_stage=3"),
    "heads": HEADS,
    "elastic": ("model.ffn_elastic={knee_k: 3, below: 16, above: 8}",),
    "flex": (*HYBRID, "model.window=200", "model.seq_len=512", "data.isolate_documents=true"),
    "compile": (*HYBRID, *HEADS, "train.compile=true", "budget.strategy=paper", "budget.budgets=[2,8]"),
}
SAME = {"fp32": 1e-6, "zero0": 1e-6}
"""Relative difference of the losses of a resumed run that is still called the same; else 2e-3, bf16's rounding."""


def data(plan: Plan, _folder: Path) -> Iterator[Found]:
    """A small set of bytes, through tools/prepare_data.py; what the others of this module read."""
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [str(library / name) for name in ("argparse.py", "ast.py", "bdb.py", "calendar.py", "csv.py", "dis.py")]
    command = [sys.executable, "tools/prepare_data.py", "--input", *sources, "--glob", "*.py", "--output",
               str(plan.folder / "set"), "--valid-fraction", "0.3", "--block-tokens", "8192", "--member-tokens",
               "8192"]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    yield {"files": len(list((plan.folder / "set").rglob("*")))}


def _overrides(plan: Plan, folder: Path, arm: str) -> list[str]:
    precision = "bf16" if plan.device == "cuda" else "fp32"
    own = (f"run.dir={folder}", f"data.path={plan.folder / 'set'}", f"train.device={plan.device}")
    return [*SMALL, f"train.precision={precision}", *own, *ARMS[arm]]


def arm(plan: Plan, folder: Path, name: str) -> Iterator[Found]:
    """A run of 12 updates; then the same from its checkpoint in the middle: equal losses, equal validation."""
    import torch

    whole, again = folder / "whole", folder / "again"
    _train(_overrides(plan, whole, name))
    rows = read_records(whole)
    yield {
        "loss": [round(row["loss"], 4) for row in rows],
        "grad_norm": [round(row["grad_norm"] or -1, 3) for row in rows],
        "step_ms": round(1e3 * min(row["step_s"] for row in rows[1:]), 2),
        "valid": rows[-1]["valid"],
        "skipped": sum(row["skipped"] for row in rows),
    }
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / sorted(p.name for p in (again / "checkpoints").glob("step-*"))[-1])
    if plan.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _train(_overrides(plan, again, name))
    resumed = read_records(again)
    off = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(rows, resumed, strict=True))
    falls = rows[-1]["loss"] < rows[0]["loss"] - 0.3
    same = len(resumed) == STEPS and off < SAME.get(name, 2e-3)
    yield {"resumed_off": off, "falls": falls, "ok": same and falls}
    if not (same and falls):
        yield {"error": "resumed otherwise" if falls else "the loss does not fall"}


def _train(overrides: Sequence[str]) -> None:
    from megassm.config.load import load_config
    from megassm.data.dataset import open_dataset
    from megassm.run.opening import open_run_directory
    from megassm.train.loop import pretrain

    config = load_config(ROOT / "configs/tiny.yaml", overrides, 1)
    opened = open_dataset(config)
    lock = open_run_directory(config)
    pretrain(config, opened)
    if lock is not None:
        lock.close()


def launcher(plan: Plan, folder: Path) -> Iterator[Found]:
    """As a user has it: train, sweep, generate, export, as processes; and a launcher with one rank."""
    run, timeout = folder / "run", 150
    rendezvous = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    train = [*rendezvous, "launch/pretrain.py", "--config", "configs/tiny.yaml", *_overrides(plan, run, "hybrid")]
    steps: dict[str, list[str]] = {
        "train": train,
        "sweep": ["tools/sweep_budgets.py", str(run), "--device", plan.device, "--budgets", "1,8"],
        "generate": ["tools/generate.py", str(run), "--prompt", "def ", "--tokens", "20", "--device", plan.device],
    }
    failed = []
    for name, command in steps.items():
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False,
                              timeout=timeout, env=dict(os.environ))  # fmt: skip
        print(f"--- {name}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        failed += [name] if done.returncode else []
        yield {f"{name}_s": round(time.perf_counter() - started, 1)}
    yield {"ok": not failed, **({"error": f"failed: {', '.join(failed)}"} if failed else {})}
