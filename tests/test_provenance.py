"""What every start notes of its code: the commit and what differs, and nothing that git ignores or that is secret."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megassm.run import provenance

NOBODY = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")


def git(folder: Path, *command: str) -> str:
    return subprocess.run(["git", "-C", folder, *NOBODY, *command], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with this package's place in it, a file that is ignored but tracked, and secrets."""
    folder = tmp_path / "checkout"
    (folder / "megassm").mkdir(parents=True)
    for name in ("megassm/__init__.py", "config.yaml", ".env", "private.py", "local.txt", "server.pem"):
        (folder / name).write_text("old = 1\n", encoding="utf-8")
    (folder / ".gitignore").write_text("local.txt\nignored.txt\n", encoding="utf-8")
    git(folder, "init", "-q")
    git(folder, "add", "-f", ".")
    git(folder, "commit", "-qm", "first")
    monkeypatch.setattr(provenance, "ROOT", folder)
    return folder


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    assert provenance.source() == (git(checkout, "rev-parse", "HEAD").strip(), [], "")


def test_what_differs_is_kept_but_for_secrets_and_what_git_ignores(checkout: Path) -> None:
    for name in ("megassm/__init__.py", "config.yaml", ".env", "local.txt", "server.pem"):
        (checkout / name).write_text("SEEN = 2\n", encoding="utf-8")
    (checkout / "private.py").write_text('api_key = "0123456789abcdef"\n', encoding="utf-8")
    (checkout / "ignored.txt").write_text("SEEN = 2\n", encoding="utf-8")
    (checkout / "new.py").write_text("SEEN = 2\n", encoding="utf-8")
    found = provenance.source()
    assert "?? new.py" in found.differs
    assert not any("ignored" in line for line in found.differs)
    assert found.patch.count("+SEEN = 2") == 2
    for name in ("megassm/__init__.py", "config.yaml"):
        assert f"+++ b/{name}" in found.patch
    for name in (".env", "private.py", "server.pem"):
        assert f"left out, for it looks like a secret: {name}\n" in found.patch
    assert "0123456789abcdef" not in found.patch
    assert "local.txt" not in found.patch
    assert json.loads(json.dumps(provenance.facts(found)))["commit"] == found.commit


@pytest.mark.parametrize(
    "line",
    [
        "-----BEGIN OPENSSH PRIVATE KEY-----", "key = 'AKIAABCDEFGHIJKLMNOP'", "token: hf_" + 30 * "a",
        "GITHUB = 'ghp_" + 36 * "b" + "'", "password: hunter2hunter2", "url = 'https://me:pass1word@host/x'",
        "SECRET_KEY='abc123abc123'", "auth_token = \"9f8e7d6c5b4a\"",
    ],
)  # fmt: skip
def test_texts_that_look_secret(line: str) -> None:
    patch = f"diff --git a/x.py b/x.py\n--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n+{line}\n"
    assert provenance.safe(patch) == "left out, for it looks like a secret: x.py\n"


@pytest.mark.parametrize("line", ["tokens = 4096", "eod_token: str = 'end'", "https://host/data?x=1", "d_model: 1024"])
def test_texts_that_do_not(line: str) -> None:
    patch = f"diff --git a/tokenizer.py b/tokenizer.py\n+{line}\n"
    assert provenance.safe(patch) == patch


def test_a_large_patch_is_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PATCH_BYTES", 200)
    patch = "".join(f"diff --git a/{name} b/{name}\n{'+x' * 100}\n" for name in ("one.py", "two.py"))
    kept = provenance.safe(patch)
    assert "one.py\n  two.py" in kept
    assert "+x" not in kept


def test_a_package_in_someone_elses_repository_is_in_none(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = checkout / "venv" / "megassm"
    inside.mkdir(parents=True)
    (inside / "__init__.py").touch()
    monkeypatch.setattr(provenance, "ROOT", inside.parent)
    assert provenance.source() == (None, [], "")


def test_a_jobs_copy_is_what_was_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "jobs" / "0001" / "code"
    code.mkdir(parents=True)
    monkeypatch.setattr(provenance, "ROOT", code)
    patch = "diff --git a/x.py b/x.py\n+seen\ndiff --git a/.env b/.env\n+SEEN\n"
    (code.parent / "version.txt").write_text(f"megassm 0.1.0\n{'a' * 40}\n M x.py\n M .env\n{patch}", encoding="utf-8")
    found = provenance.source()
    assert (found.commit, found.differs) == ("a" * 40, [" M x.py", " M .env"])
    assert "+seen" in found.patch
    assert "SEEN" not in found.patch
