"""What tools/generate.py prints while it draws, and the coldest temperatures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megassm.checkpoint.open import open_model
from megassm.data.tokenizer.base import BytesTokenizer
from megassm.eval.generate import TextStream
from megassm.eval.sampling import Sampling, probabilities
from tests.conftest import run_python


def test_a_text_comes_in_whole_characters_and_once() -> None:
    parts: list[str] = []
    stream = TextStream(BytesTokenizer(), parts.append)
    text = "aé€𝄞\ufffd!"
    ids = list(text.encode())
    for count in range(1, len(ids) + 1):
        assert stream(ids[:count]) is False, "it ends no text"
    stream.finish(text)
    assert "".join(parts) == text
    assert parts == ["a", "é", "€", "𝄞", "\ufffd!"]
    cut: list[str] = []
    stream = TextStream(BytesTokenizer(), cut.append)
    stream(ids[:2])
    stream.finish("a\ufffd")
    assert cut == ["a", "\ufffd"], "a character that is never finished is said at the end"


@pytest.mark.parametrize("temperature", [0.0, 1e-46, 1e-38, 1e-10])
def test_the_coldest_temperatures_take_the_likeliest(temperature: float) -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 2.999], [-1e4, -2e4, 0.0]])
    for more in ({}, {"top_k": 2}, {"top_p": 0.5}):
        drawn_BV = probabilities(logits_BV, Sampling(temperature=temperature, **more))
        assert drawn_BV.tolist() == [[0, 1, 0], [0, 0, 1]]


def test_the_tool_prints_what_it_writes(trained: Path, tmp_path: Path) -> None:
    table = tmp_path / "texts.json"
    done = run_python("tools/generate.py", str(trained), "--prompt", "def ", "--budgets", "2,8", "--tokens", "100",
                      "--temperature", "1e-46", "--json", str(table))  # fmt: skip
    texts = json.loads(table.read_text(encoding="utf-8"))
    assert [row["k"] for row in texts] == [2, 8]
    shown = done.stdout.split("--- K = ")[1:]
    for row, part in zip(texts, shown, strict=True):
        assert part.startswith(f"{row['k']}\ndef ")
        if row["text"].isprintable():
            assert part.strip() == f"{row['k']}\n{row['text']}".strip()
    model = open_model(trained)
    for k in (2, 8):
        warning = model.beyond_trained(len("def ") + 100, k)
        assert warning is None or f"warning: {warning}" in done.stderr
    assert ("grow without bound" in done.stderr) == any(model.beyond_trained(104, k) for k in (2, 8))
