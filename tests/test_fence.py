"""Only the newest start of a run may write."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megassm.checkpoint import format, publish
from megassm.config.schema import Config
from megassm.data.dataset import open_dataset
from megassm.errors import UserError
from megassm.parallel.watchdog import RankProgress, Watchdog
from megassm.parallel.world import join_world, leave_world
from megassm.run.directory import FAILURE, INCARNATIONS
from megassm.run.fence import SupersededError, newest_number, restarts_the_newest, take
from megassm.run.journal import Journal
from megassm.run.opening import clear_partial, open_run_directory
from megassm.train.setup import set_up
from tests.conftest import run_python
from tests.ranks import run_on_ranks

Make = Callable[..., Config]


def files(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_every_start_takes_a_higher_number(tmp_path: Path) -> None:
    first = take(tmp_path)
    first.check()
    second = take(tmp_path)
    assert (first.number, second.number, newest_number(tmp_path)) == (1, 2, 2)
    assert second.holds()
    with pytest.raises(SupersededError, match=r"start 2 of this run \(host .*\) has taken over from start 1, which is"):
        first.check()
    assert set(json.loads((tmp_path / INCARNATIONS / "0002").read_text())) == {
        "host",
        "pid",
        "job_id",
        "restart",
        "time",
    }
    (tmp_path / INCARNATIONS / "0002").unlink()
    with pytest.raises(SupersededError, match="the file of this start, 0002, is gone"):
        second.check()


def test_starts_at_the_same_time_take_different_numbers(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        taken = threads.map(lambda _: take(tmp_path).number, range(32))
    assert sorted(taken) == list(range(1, 33))


def test_a_superseded_start_writes_no_row_and_no_failure(small_config: Make, tmp_path: Path) -> None:
    config = small_config()
    open_run_directory(config)
    run_dir = Path(config.run.dir)
    old = take(run_dir)
    journal = Journal(config, 0, old)
    watchdog = Watchdog((0, 1), RankProgress(), 60, run_dir / FAILURE)
    watchdog.may_write = old.holds
    take(run_dir)
    before = files(run_dir)
    with pytest.raises(SupersededError):
        journal.write({"step": 1})
    watchdog.refuse("why")
    assert files(run_dir) == before
    assert not (run_dir / FAILURE).exists()


def superseded_while_saving(config: Config) -> None:
    """A newer start comes between the last look at the fence and the rename; the old one then tries once more."""
    world = join_world(config)
    try:
        run = set_up(config, open_dataset(config), world)
        whole = publish.publish

        def late(partial: Path, final: Path, manifest: format.Manifest) -> None:
            take(run.fence.run_dir)
            assert clear_partial(run.fence.run_dir) == [partial.name]
            whole(partial, final, manifest)

        publish.publish = late
        assert run.saver.begin(1) is None
        ended = run.saver.finish()
        assert ended is not None
        assert "No such file" in ended.failure
        before = files(run.fence.run_dir)
        with pytest.raises(SupersededError):
            run.saver.begin(2)
        assert files(run.fence.run_dir) == before
        assert format.newest_checkpoint(run.fence.run_dir) == (None, [])
    finally:
        leave_world()


def test_a_superseded_start_publishes_no_checkpoint(small_config: Make) -> None:
    config = small_config()
    open_run_directory(config)
    run_on_ranks(1, superseded_while_saving, config)


def test_a_lock_that_an_older_life_of_the_same_job_holds_is_taken_over(
    small_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    orphan = open_run_directory(config)
    assert orphan is not None
    take(Path(config.run.dir))
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not restarts_the_newest(Path(config.run.dir)), "another job"
    with pytest.raises(UserError, match="another job is training there"):
        open_run_directory(config)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lock = open_run_directory(config)
    assert lock is not None
    with lock:
        monkeypatch.delenv("SLURM_RESTART_COUNT")
        with pytest.raises(UserError, match="another job is training there"):
            open_run_directory(config)
    orphan.close()


def test_signals_before_there_is_anything_to_save_end_the_process(tmp_path: Path) -> None:
    code = "import os; from megassm.run.stop import leave_when_told as f; f(); os.kill(os.getpid(), {}); print('lives')"
    for number in ("10", "15"):
        done = run_python("-c", code.format(number), check=False)
        assert (done.returncode, done.stdout) == (75, "")


def test_signals_may_come_twice(tmp_path: Path) -> None:
    code = (
        "import os, signal; from megassm.run.stop import StopRequest; s = StopRequest(); assert not s.received\n"
        "for n in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):\n"
        "    os.kill(os.getpid(), n); assert s.received and f'after step 7 ({n.name})' in s.told(7)\n"
        "os.kill(os.getpid(), signal.SIGINT); print('lives')"
    )
    done = run_python("-c", code, check=False)
    assert (done.returncode, done.stdout) == (-2, "")


@pytest.mark.parametrize(
    ("rank", "code", "says"), [({}, -2, "Ctrl-C again ends it at once"), ({"RANK": "0"}, 0, "Ctrl-\\ ends it at once")]
)
def test_ctrl_c_twice_saves_under_a_launcher(rank: dict[str, str], code: int, says: str) -> None:
    text = (
        "import os, signal; from megassm.run.stop import StopRequest; s = StopRequest()\n"
        "for n in range(3): os.kill(os.getpid(), signal.SIGINT)\n"
        "assert s.received; print('saves')"
    )
    done = run_python("-c", text, check=False, **rank)
    assert (done.returncode, done.stdout) == (code, "saves\n" * (code == 0))
    assert done.stderr.count("stopping: whole updates are being saved") == 1
    assert says in done.stderr


@pytest.mark.parametrize("ignored", [False, True], ids=["a terminal that closes", "nohup"])
def test_a_hangup_saves_but_where_it_is_ignored(ignored: bool) -> None:
    text = (
        f"import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN if {ignored} else signal.SIG_DFL)\n"
        "from megassm.run.stop import StopRequest, leave_when_told\n"
        "if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN: leave_when_told(); os.kill(os.getpid(), signal.SIGHUP)\n"
        "s = StopRequest(); os.kill(os.getpid(), signal.SIGHUP); print(s.received, s.told(7))"
    )
    done = run_python("-c", text)
    assert done.stdout.startswith("False" if ignored else "True stopped by a signal after step 7 (SIGHUP)")
