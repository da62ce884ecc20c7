"""What makes a run the same run: what may not change between a checkpoint and what continues it."""

from __future__ import annotations

from typing import Any

from megassm.checkpoint.format import Checkpoint
from megassm.config.changes import fixed_knobs
from megassm.config.schema import Config
from megassm.errors import UserError

FINGERPRINT = "the data's fingerprint"


def run_identity(config: Config, data_fingerprint: str) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that continues it, by knob.

    The mesh and the ZeRO stage may change, and so may everything that a schedule is made of (`config.changes`).
    """
    return fixed_knobs(config) | {FINGERPRINT: data_fingerprint}


def check_identity(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Checks that a run may be continued from a checkpoint.

    Raises:
        UserError: with every difference.
    """
    # as this version reads it: a knob newer than the checkpoint has its default; one that may change since is not there
    theirs = run_identity(checkpoint.config, checkpoint.manifest.identity.get(FINGERPRINT, ""))
    differences = [
        f"{name} is {_short(identity.get(name))}, the checkpoint has {_short(theirs.get(name))}"
        for name in sorted(theirs.keys() | identity.keys())
        if theirs.get(name) != identity.get(name)
    ]
    if differences:
        raise UserError(
            f"{checkpoint.folder}: cannot be continued by this run: {'; '.join(differences)}. "
            "Restore these, move that folder away if it is another run's, or start a new run with another run.dir"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:16]}..."
