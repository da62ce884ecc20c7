"""Formats a record of the journal as a line for people, and sizes, rates and durations."""

from __future__ import annotations

from megassm.run.lines import Record

WORTH_SAYING = 0.05
"""Share of an update spent waiting from which on a line has it."""


def format_record(record: Record, steps: int, eta_s: float) -> str:
    """One line for people, and one more where validation ran. Within 120 columns: the journal has the rest."""
    parts = [
        f"step {record['step']:>{len(str(steps))}}/{steps}",
        f"loss {_number(record['loss']):.3f}",
        *([] if record["bits_per_byte"] is None else [f"{record['bits_per_byte']:.3f} bits/byte"]),
        f"K {record['k']:>2}",
        f"lr {record['lr']:.1e}".replace("e-0", "e-"),
        f"norm {_number(record['grad_norm']):.2f}",
        f"{rate(record['tokens_per_s'])} tok/s",
        *([] if record["mfu"] is None else [f"MFU {record['mfu']:.0%}"]),
        *([f"wait {waiting:.0%}"] if (waiting := _waiting(record)) >= WORTH_SAYING else []),
        f"eta {duration(eta_s)}",
    ]
    line = "  ".join(parts)
    if "valid" in record:
        scores = "  ".join(f"K={k}: {value:.3f}" for k, value in record["valid"].items())
        line += f"\n  validation bits/byte   {scores}"
    if "valid_accuracy" in record:
        scores = "  ".join(f"K={k}: {value:.1%}" for k, value in record["valid_accuracy"].items())
        line += f"\n  validation accuracy   {scores}"
    return line


def is_validated(record: Record) -> bool:
    """Whether validation ran after this update: scores of text, or of a task."""
    return "valid" in record or "valid_accuracy" in record


def tokens_of_planned(record: Record, steps: int) -> str:
    """Such as "1.3/10.0 B tokens": those seen, of those that `steps` updates see."""
    planned = record["tokens"] / record["step"] * steps
    size, name = next(unit for unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")) if planned >= unit[0])
    digits = 1 if size > 1 else 0
    return f"{record['tokens'] / size:.{digits}f}/{planned / size:.{digits}f} {name + ' ' if name else ''}tokens"


def rate(tokens_per_s: float) -> str:
    """Such as 3,810 or 45.0M."""
    return f"{tokens_per_s / 1e6:,.1f}M" if tokens_per_s >= 1e6 else f"{tokens_per_s:,.0f}"


def _waiting(record: Record) -> float:
    """Share of an update in which this rank computed nothing: it waited for data, or for other ranks."""
    phases = record.get("phases_s") or {"data": record["data_wait_s"]}
    share: float = (phases["data"] + phases.get("communication", 0.0)) / record["step_s"]
    return share


def _number(value: float | None) -> float:
    """A figure of a record; null where it was not finite."""
    return float("nan") if value is None else value


def duration(seconds: float) -> str:
    """Such as 2m05s, 3h20m, 4d06h, 12d."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 240:
        return f"{hours // 24}d"
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
