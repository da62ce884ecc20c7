"""What a start of a run was made of: versions, commit, and all that differs from it, in RUN_DIR/environments.

    environments/0003.json     of the run's third start
    environments/0003.patch    what its code had beyond the commit, where it had something; for its owner alone

The patch has tracked files only: never what git ignores, and of a file that looks like a secret its name alone.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from megassm import __version__
from megassm.errors import HIDDEN
from megassm.run.directory import JOB_CODE, JOB_VERSION

ROOT = Path(__file__).parents[2]
"""What holds the package: a checkout, a job's copy of one, or where packages are installed."""
PACKAGES = ("torch", "deepspeed", "numpy", "scipy", "pydantic", "safetensors", "webdataset", "wandb", "triton")
PATCH_BYTES = 2**20
"""Of a larger difference only the names are kept."""
GIT_S = 20.0

SECRET_NAME = re.compile(
    r"(^|/)(\.env.*|\.netrc|\.npmrc|\.pypirc|\.htpasswd|\.git-credentials|id_(rsa|dsa|ecdsa|ed25519).*|"
    r"[^/]*\.(pem|key|p12|pfx|kdbx|keytab|jks)|[^/]*(secret|credential|passw(or)?d|api_?key)[^/]*)$",
    re.IGNORECASE,
)
SECRET_TEXT = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_\w{30,}|\bhf_\w{30,}|\bsk-[\w-]{20,}|"
    r"\bxox[abpr]-\w|\beyJ[\w-]{20,}\.[\w-]{20,}|://[^/\s:@'\"]+:[^/\s:@'\"]+@|"
    r"(?i:(secret|passw(or)?d|api_?key|access_?key|(access|auth|api|session|refresh|bearer)_?token)\w*['\"]?\s*[:=]\s*"
    r"['\"]?[^\s'\"]*\d[^\s'\"]{7,})"
)


class Source(NamedTuple):
    """The code of this process as git sees it."""

    commit: str | None
    """None where the package is in no checkout."""
    differs: list[str]
    """Files that differ from the commit, untracked ones among them, as `git status --short` has them."""
    patch: str


def source() -> Source:
    """What this package runs from."""
    copied = ROOT.parent / JOB_VERSION
    if ROOT.name == JOB_CODE and copied.is_file():  # a job's copy: what was noted when it was submitted
        return _noted(copied.read_text(encoding="utf-8", errors="replace"))
    if not git("ls-files", "--", "megassm/__init__.py"):  # not a checkout of this project, whatever lies around it
        return Source(None, [], "")
    commit = git("rev-parse", "HEAD").strip()
    return Source(commit or None, git("status", "--short").splitlines(), _patch())


def facts(source: Source) -> dict[str, Any]:
    """What environment.json has of every start."""
    return {
        "megassm": __version__,
        "commit": source.commit,
        "differs": source.differs,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": dict(_versions()),
    }


def safe(patch: str) -> str:
    """A patch without the files whose name or text looks like a secret; a large one without all of them."""
    parts = re.split(r"(?m)^(?=diff --git )", patch)
    kept = [part for part in parts if part.strip() and not looks_secret(part)]
    told = [f"left out, for it looks like a secret: {_name(part)}\n" for part in parts if looks_secret(part)]
    text = "".join([*told, *kept])
    if len(text) <= PATCH_BYTES:
        return text
    names = "".join(f"  {_name(part)}\n" for part in kept)
    return f"{''.join(told)}left out, for there are {len(text):,} characters of it:\n{names}"[:PATCH_BYTES]


def looks_secret(part: str) -> bool:
    """Whether a file's part of a patch must not be written down."""
    return bool(part.strip()) and bool(SECRET_NAME.search(_name(part)) or SECRET_TEXT.search(part))


def _name(part: str) -> str:
    """The file that a part of a patch is of."""
    return part.partition("\n")[0].rpartition(" b/")[2].strip('"') or HIDDEN


def _patch() -> str:
    """Tracked files' differences from the commit; those that git ignores although they are tracked are left out."""
    ignored = git("ls-files", "-z", "--cached", "--ignored", "--exclude-standard", "--full-name", ":(top)").split("\0")
    excluded = [f":(top,exclude,literal){name}" for name in ignored if name]
    return safe(git("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--", ":(top)", *excluded))


def _noted(text: str) -> Source:
    """Of the file that was written when a job was submitted: a line of the version, the commit, status, differences."""
    _, _, rest = text.partition("\n")
    commit, _, rest = rest.partition("\n")
    status, start, patch = rest.partition("diff --git ")
    return Source(commit or None, status.splitlines(), safe(start + patch))


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append((name, version(name)))
    return found


def git(*command: str, errors: str = "replace", timeout_s: float | None = GIT_S) -> str:
    """What git prints about `ROOT`; empty where it cannot say. `errors` as `bytes.decode` has it."""
    asked = ["git", "-C", str(ROOT), "-c", "core.fsmonitor=false", *command]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(asked, capture_output=True, timeout=timeout_s, check=False)
        return done.stdout.decode(errors=errors) if done.returncode == 0 else ""
    return ""
