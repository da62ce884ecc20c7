"""A whole run on data behind a signed URL: the same losses as on a folder, and the signature is nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megassm.run.directory import METRICS
from tests.conftest import SMALL, run_python
from tests.fault_server import FaultServer, serving
from tests.test_train import command

SECRET = "s3cr3t-signature"


def rows_of(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / METRICS).read_text(encoding="utf-8").splitlines()]


def train(run_dir: Path, data: str | Path, *overrides: str, **environment: str) -> str:
    steady = "optim.min_lr_ratio=1.0"  # so that train.steps plays no part in a step
    arguments = command(run_dir, Path("data"), 1, *SMALL, f"data.path={data}", steady, *overrides)
    done = run_python(*arguments[1:], **environment)
    return done.stdout + done.stderr


def test_a_run_on_a_signed_url_is_the_run_on_a_folder(data_path: Path, tmp_path: Path) -> None:
    url_run, folder_run, cache = tmp_path / "url", tmp_path / "folder", tmp_path / "cache"
    train(folder_run, data_path)
    with serving(data_path.parent) as server:
        server.faulty = "train/shard"
        server.faults.extend(["fin", "503", "flip"])
        url = f"{server.url}/{data_path.name}"
        said = train(url_run, f"{url}?sig={SECRET}", "train.steps=5", f"data.cache_dir={cache}")
        assert all(path.endswith(f"?sig={SECRET}") for path, _ in server.requests)
        said += train(url_run, url, f"data.cache_dir={cache}", MEGASSM_DATA_QUERY=f"{url}?sig={SECRET}")
    assert "continuing after step 5" in said
    over_http, local = rows_of(url_run), rows_of(folder_run)
    assert [row["loss"] for row in over_http] == [row["loss"] for row in local]
    assert sum(row["data_reconnects"] for row in over_http) == 2  # type: ignore[misc]
    assert sum(row["data_refetches"] for row in over_http) == 1  # type: ignore[misc]
    assert over_http[5]["data_cache_hits"]
    assert over_http[0]["data_fetched_bytes"]
    assert over_http[-1]["epochs"] == {"data": pytest.approx(8 * 4 / server_samples(data_path), rel=1e-6)}
    for path in url_run.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert url in (url_run / "config.yaml").read_text(encoding="utf-8")
    assert SECRET not in said


def server_samples(data_path: Path) -> int:
    tokens = json.loads((data_path / "train" / "index.json").read_text(encoding="utf-8"))["tokens"]
    return -(-(tokens - 1) // 64)


def test_a_wrong_url_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        done = refused(tmp_path, server, "nowhere")
    assert f"{server.url}/nowhere/train/index.json: no such file; make the data set with" in done


def refused(tmp_path: Path, server: FaultServer, name: str) -> str:
    arguments = command(tmp_path / "run", Path("data"), 1, *SMALL, f"data.path={server.url}/{name}?sig={SECRET}")
    done = run_python(*arguments[1:], check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr
    assert not (tmp_path / "run").exists()
    return done.stderr
