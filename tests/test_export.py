"""Exported families: smaller files that score what the sweep says, opened by megassm, and trained on from."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megassm.checkpoint.exported import SUMS, WEIGHTS, open_model_folder, write_model_folder
from megassm.checkpoint.format import find_checkpoint, load_model
from megassm.cli.arguments import TableRow
from megassm.cost import parameters
from megassm.data.tokenizer.base import load_tokenizer
from megassm.errors import UserError
from megassm.eval.score import score
from megassm.eval.session import Session, open_for_text, open_session
from megassm.eval.watch import SweepRequest, sweep_path
from megassm.export.write import ExportPlan, export_models
from megassm.model import build_model, losses_at
from megassm.parallel.world import join_peers, leave_world
from tests.conftest import HYBRID, ROOT, SMALL, run_python
from tests.test_model import config

BUDGETS = [1, 2, 4, 8]


@pytest.fixture(scope="module")
def session(trained: Path) -> Session:
    return open_session(trained, None, "cpu")


@pytest.fixture(scope="module")
def family(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TableRow]]:
    """The folder and the tool's table of `--all`."""
    folder = tmp_path_factory.mktemp("export")
    options = ("--budgets", "1,2,4,8", "--output", str(folder / "family"), "--json", str(folder / "table.json"))
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    chat = ("--chat-template", str(folder / "chat.jinja"))
    run_python("tools/export.py", str(trained), "--all", *options, *chat)
    return folder / "family", json.loads((folder / "table.json").read_text())


def bits_per_byte(folder: Path, session: Session) -> float:
    model = load_model(open_model_folder(folder))

    def losses(ids_BT: Tensor, k: int) -> Tensor:
        nll: Tensor = losses_at(model, ids_BT, k, session.document_end)
        return nll

    batches = session.validation(session.config.eval.sequences)
    return score(losses, batches, model.config.num_channels, session.token_bytes, session.device).bits_per_byte


def test_every_file_scores_what_the_sweep_says_and_is_smaller_in_proportion(
    family: tuple[Path, list[TableRow]], session: Session
) -> None:
    folder, table = family
    peers = join_peers("cpu")
    (curve,) = sweep_path(session.checkpoint.folder, SweepRequest(budgets=BUDGETS), peers)[0].curves
    leave_world()
    assert [row["k"] for row in table] == BUDGETS
    for row, measured in zip(table, curve.rows, strict=True):
        own = folder / f"k-{measured.k}"
        assert bits_per_byte(own, session) == pytest.approx(measured.bits_per_byte, abs=1e-4)
        assert row["bits_per_byte"] == pytest.approx(measured.bits_per_byte, abs=1e-4)
        assert row["gap_percent"] == pytest.approx(measured.gap_percent, abs=1e-2)
        assert row["parameters"] == measured.parameters == parameters(session.config.model, measured.k)
        size = (own / WEIGHTS).stat().st_size
        assert row["file_bytes"] == size
        assert 4 * measured.parameters < size < 4 * measured.parameters + 5000  # the header's names
        assert row["logits_difference"] <= 1e-5
    card = (folder / "README.md").read_text()
    for row in table:
        assert f"| {row['k']} | {row['parameters']:,} |" in card
        assert f"{row['bits_per_byte']:.4f}" in (folder / f"k-{row['k']}" / "README.md").read_text()


def test_logits_equal_the_masked_model(family: tuple[Path, list[TableRow]], session: Session) -> None:
    batch = session.validation(2)[0]
    ids = torch.from_numpy(batch.ids_BT[:, :-1])
    whole = load_model(session.checkpoint).double()
    for k in BUDGETS:
        opened = open_for_text(family[0] / f"k-{k}", None, "cpu")
        assert opened.tokenizer.sha256 == session.tokenizer.sha256
        for budget in {1, k}:
            with torch.no_grad():
                found = opened.model.double()(ids, budget)
                assert torch.allclose(found, whole(ids, budget), atol=1e-5, rtol=0)


def test_a_wrong_file_is_not_published(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(folder: Path, model: torch.nn.Module, *rest: object) -> None:
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        write_model_folder(folder, model, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("megassm.export.write.write_model_folder", wrong)
    with pytest.raises(UserError, match=r"logits of the written file differ from the model's by .*nothing was"):
        export_models(session, {2: tmp_path / "k-2"}, ExportPlan(sequences=2))
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_halves_the_file(family: tuple[Path, list[TableRow]], session: Session, tmp_path: Path) -> None:
    (half,) = export_models(session, {4: tmp_path / "half"}, ExportPlan(torch.bfloat16, sequences=4))
    whole = family[1][2]
    assert half.file_bytes == pytest.approx(whole["file_bytes"] / 2, rel=0.05)
    assert half.bits_per_byte == pytest.approx(whole["bits_per_byte"], rel=1e-2)
    assert half.bits_per_byte != whole["bits_per_byte"]


@pytest.mark.parametrize("seq_len", [32, 96])
def test_another_length(session: Session, tmp_path: Path, seq_len: int) -> None:
    (found,) = export_models(session, {4: tmp_path / "other"}, ExportPlan(seq_len=seq_len, sequences=4))
    assert open_model_folder(tmp_path / "other").config.seq_len == seq_len
    assert found.trained_filters_bits_per_byte is not None
    for value in (found.bits_per_byte, found.trained_filters_bits_per_byte):
        assert math.isfinite(value)
    assert found.bits_per_byte != found.trained_filters_bits_per_byte
    card = (tmp_path / "other/README.md").read_text()
    assert f"derived for {seq_len}" in card
    assert f"| {found.bits_per_byte:.4f} | {found.trained_filters_bits_per_byte:.4f} |" in card


def test_refusals(session: Session, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="K_max = 8"):
        export_models(session, {9: tmp_path / "x"}, ExportPlan())
    with pytest.raises(UserError, match="--seq-len 3: must be at least K = 4"):
        export_models(session, {4: tmp_path / "x"}, ExportPlan(seq_len=3))
    with pytest.raises(UserError, match=r"checkpoints: holds something that is not an exported model"):
        export_models(session, {4: trained / "checkpoints"}, ExportPlan())
    with pytest.raises(UserError, match=r"config\.json: not an exported model"):
        open_model_folder(trained)
    for options in ((), ("--k", "2", "--all"), ("--k", "2", "--budgets", "1,2"), ("--k", "0")):
        assert run_python("tools/export.py", str(trained), *options, check=False).returncode == 2


def test_export_replaces_an_earlier_one(session: Session, tmp_path: Path) -> None:
    for k in (2, 4):
        export_models(session, {k: tmp_path / "same"}, ExportPlan(sequences=2))
        assert open_model_folder(tmp_path / "same").config.num_channels == k
    assert [path.name for path in tmp_path.iterdir()] == ["same"]


def test_generate_opens_an_export(family: tuple[Path, list[TableRow]], trained: Path, tmp_path: Path) -> None:
    def row(path: Path, *more: str) -> dict[str, Any]:
        options = ("--prompt", "def f(", "--tokens", "12", "--temperature", "0", "--budgets", "4", *more)
        run_python("tools/generate.py", str(path), *options, "--json", str(tmp_path / "text.json"))
        (found,) = json.loads((tmp_path / "text.json").read_text())
        return found

    plain, drafted = row(trained), row(family[0] / "k-4", "--draft-k", "auto")
    assert drafted["text"] == plain["text"]
    assert drafted["speed_up"] > 0
    assert 0 <= drafted["acceptance"] <= 1
    for wrong, said in ((("--draft-k", "few"), "'few' is not a budget; give a number such as 4, or auto"),
                        (("--draft-tokens", "3"), "--draft-tokens goes with --draft-k")):  # fmt: skip
        refused = run_python("tools/generate.py", str(trained), "--prompt", "x", *wrong, check=False)
        assert refused.returncode == 2
        assert said in refused.stderr


def start(run_dir: Path, data_path: Path, *overrides: str, check: bool = True) -> str:
    own = (f"run.dir={run_dir}", f"data.path={data_path}", *HYBRID, "train.steps=4", "optim.lr=1e-12")
    done = run_python(
        "launch/pretrain.py", "--config", "configs/tiny.yaml", *SMALL, *own, "optim.warmup_steps=1", *overrides,
        check=check,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_training_starts_from_an_export(
    family: tuple[Path, list[TableRow]], session: Session, data_path: Path, tmp_path: Path
) -> None:
    folder = family[0] / "k-4"
    small = (
        "model.num_channels=4",
        "model.d_ffn=64",
        "budget.budgets=[1,2,4]",
        "eval.budgets=[1,4]",
        "optim.weight_decay=0",
    )
    said = start(tmp_path / "run", data_path, *small, f"run.init_from={folder}", "model.norm_eps=1e-5")
    assert f"starting from the weights of {folder}; there model.norm_eps=1e-06" in said
    checkpoint = find_checkpoint(tmp_path / "run")
    kept = dict(checkpoint.weights())
    for name, value in open_model_folder(folder).weights():  # a rate of 1e-12 moves nothing that float32 shows
        assert torch.allclose(kept[name], value, atol=1e-9), name
    assert start(tmp_path / "run", data_path, *small, "run.init_from=/nowhere", "model.norm_eps=1e-5").startswith(
        "continuing after step 4"
    )


def test_another_model_is_no_start(family: tuple[Path, list[TableRow]], data_path: Path, tmp_path: Path) -> None:
    said = start(tmp_path / "run", data_path, f"run.init_from={family[0] / 'k-4'}", check=False)
    assert "blocks.0.ffn.down.weight is (32, 64), not (32, 96); " in said
    assert " and 6 more." in said
    assert "Set model.num_channels=4, model.d_ffn=64, or choose another run.init_from" in said
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_another_tokenizer_is_no_start(tmp_path: Path) -> None:
    write_model_folder(tmp_path, build_model(config(vocab_size=300), 0), load_tokenizer("bytes"), torch.float32)
    folder = open_model_folder(tmp_path)

    class Other:
        name, sha256 = "other", "0"

    with pytest.raises(UserError, match="its tokenizer is bytes, the data set's is other"):
        folder.check_origin(folder.config, Other())  # type: ignore[arg-type]


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    write_model_folder(tmp_path, build_model(config(vocab_size=300), 0), load_tokenizer("bytes"), torch.float32)
    sums = (tmp_path / SUMS).read_text()
    assert subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=tmp_path, check=False).returncode == 0
    weights = (tmp_path / WEIGHTS).read_bytes()
    assert b'"F32"' in weights
    (tmp_path / WEIGHTS).write_bytes(weights.replace(b'"F32"', b'"I32"'))
    for check in (
        lambda: list(open_model_folder(tmp_path).weights()),
        lambda: list(open_model_folder(tmp_path).weights(2)),
    ):
        with pytest.raises(UserError, match=rf"{WEIGHTS}: damaged: its SHA-256 is not that of SHA256SUMS"):
            check()
    said = run_python("tools/verify_data.py", str(tmp_path), check=False)
    assert (said.returncode, "damaged: its SHA-256" in said.stderr) == (1, True)
    (tmp_path / WEIGHTS).write_bytes(weights)
    assert "checked files" in run_python("tools/verify_data.py", str(tmp_path)).stdout
    for text in (sums.replace("a", "\xe4", 1), sums.partition("\n")[2] + "x\n", "", sums.replace(WEIGHTS, "x")):
        (tmp_path / SUMS).write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="not the checksums of an exported model"):
            open_model_folder(tmp_path)
    (tmp_path / SUMS).write_text(sums)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"d_ffn": 32', '"d_ffn": 33'))
    with pytest.raises(
        UserError, match=r"config\.json: damaged: its SHA-256 .* or remove SHA256SUMS if you have changed"
    ):
        open_model_folder(tmp_path)
    (tmp_path / SUMS).unlink()
    with pytest.raises(UserError, match=r"ffn\..*expected"):
        list(open_model_folder(tmp_path).weights())
    (tmp_path / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"its weights have 7"):
        list(open_model_folder(tmp_path).weights())


def test_code_and_chat_template_are_copied(family: tuple[Path, list[TableRow]]) -> None:
    own = (ROOT / "megassm/hf/modeling_megassm.py").read_bytes()
    assert (family[0] / "k-1/modeling_megassm.py").read_bytes() == own
    template = (family[0].parent / "chat.jinja").read_bytes()
    assert (family[0] / "k-1/chat_template.jinja").read_bytes() == template
    assert "  chat_template.jinja" in (family[0] / "k-1" / SUMS).read_text()
