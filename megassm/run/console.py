"""A row of the journal as a line for people; sizes and times as people write them."""

from __future__ import annotations

from megassm.run.records import Row

WORTH_SAYING = 0.05
"""Share of an update spent waiting from which on a line has it."""


def format_row(row: Row, steps: int, eta_s: float) -> str:
    """One line for people, and one more where validation ran. Within 120 columns: the journal has the rest."""
    parts = [
        f"step {row['step']:>{len(str(steps))}}/{steps}",
        f"loss {_number(row['loss']):.3f}",
        *([] if row["bits_per_byte"] is None else [f"{row['bits_per_byte']:.3f} bits/byte"]),
        f"K {row['k']:>2}",
        f"lr {row['lr']:.1e}".replace("e-0", "e-"),
        f"norm {_number(row['grad_norm']):.2f}",
        f"{rate(row['tokens_per_s'])} tok/s",
        f"MFU {row['mfu']:.0%}",
        *([f"wait {waiting:.0%}"] if (waiting := _waiting(row)) >= WORTH_SAYING else []),
        f"eta {duration(eta_s)}",
    ]
    line = "  ".join(parts)
    if "valid" in row:
        scores = "  ".join(f"K={k}: {value:.3f}" for k, value in row["valid"].items())
        line += f"\n  validation bits/byte   {scores}"
    if "valid_accuracy" in row:
        scores = "  ".join(f"K={k}: {value:.1%}" for k, value in row["valid_accuracy"].items())
        line += f"\n  validation accuracy   {scores}"
    return line


def is_validated(row: Row) -> bool:
    """Whether validation ran after this update: scores of text, or of a task."""
    return "valid" in row or "valid_accuracy" in row


def tokens_of_planned(row: Row, steps: int) -> str:
    """Such as "1.3/10.0 B tokens": those seen, of those that `steps` updates see."""
    planned = row["tokens"] / row["step"] * steps
    size, name = next(unit for unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")) if planned >= unit[0])
    digits = 1 if size > 1 else 0
    return f"{row['tokens'] / size:.{digits}f}/{planned / size:.{digits}f} {name + ' ' if name else ''}tokens"


def rate(tokens_per_s: float) -> str:
    """Such as 3,810 or 45.0M."""
    return f"{tokens_per_s / 1e6:,.1f}M" if tokens_per_s >= 1e6 else f"{tokens_per_s:,.0f}"


def _waiting(row: Row) -> float:
    """Share of an update in which this rank computed nothing: it waited for data, or for other ranks."""
    phases = row.get("phases_s") or {"data": row["data_wait_s"]}
    share: float = (phases["data"] + phases.get("communication", 0.0)) / row["step_s"]
    return share


def _number(value: float | None) -> float:
    """A figure of a row; null where it was not finite."""
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
