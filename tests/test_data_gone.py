"""A run whose data folder is gone is generated from, swept and exported: its tokenizer is in the run directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megassm.checkpoint.open import open_tokenizer
from megassm.data.dataset import own_tokenizer
from megassm.data.tokenizer.base import load_tokenizer
from megassm.errors import UserError
from megassm.eval import session as session_module
from megassm.eval import text as text_module
from megassm.eval.session import open_for_text, open_session
from megassm.eval.text import open_texts
from megassm.eval.watch import SweepRequest
from megassm.export.write import ExportPlan, export_models

WHY = "data.path = 'gone': no such directory"


@pytest.fixture
def lost(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, in a copy, on a machine without its data."""

    def gone(*_: object) -> None:
        raise UserError(WHY)

    for module in (session_module, text_module):
        monkeypatch.setattr(module, "open_dataset", gone)
    monkeypatch.setattr("megassm.data.dataset.open_dataset", gone)
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_run_keeps_its_tokenizer(trained: Path, lost: Path, data_path: Path, tmp_path: Path) -> None:
    own = load_tokenizer(own_tokenizer(data_path))
    assert open_tokenizer(lost).sha256 == own.sha256
    assert open_for_text(lost, None, "cpu").tokenizer.sha256 == own.sha256
    session = open_session(lost, None, "cpu")
    with pytest.raises(UserError, match=WHY):
        session.validation(2)
    text = tmp_path / "a.txt"
    text.write_text("To be, or not to be, that is the question. " * 200)
    texts, tokenizer = SweepRequest(data=[str(text)]).open(session.checkpoint)
    assert [one.name for one in texts] == [str(text)]
    assert tokenizer.sha256 == own.sha256
    with pytest.raises(UserError, match=WHY):
        open_texts(session.config, [], kept=session.checkpoint.kept_tokenizer)
    exported = export_models(open_session(lost, str(text), "cpu"), {2: tmp_path / "k-2"}, ExportPlan(sequences=4))
    assert exported[0].logits_difference < 1e-5
    with pytest.raises(UserError, match="is plain text; this needs a prepared data set"):
        _ = open_session(lost, str(text), "cpu").data
    shutil.rmtree(lost / "tokenizer")  # as an older run is
    with pytest.raises(UserError, match=r"tokenizer: no such folder, and the run's data cannot be opened: data\.path"):
        open_tokenizer(lost)
