"""What is for training and what for validation; what divides a text file into documents."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.data.prepare import text as text_module
from megassm.data.prepare.documents import Piece, ReadCounts, read_documents
from megassm.data.prepare.inputs import find_inputs
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.split import FEW_DOCUMENTS, Split, plan_split
from megassm.data.prepare.text import cut_pieces, documents_of_text
from megassm.errors import UserError
from tests.conftest import run_python
from tests.test_prepare import done, job_of, texts_of

STORY = "Once\nupon a time.\n\nThe end.\n<|endoftext|>\nTwice.\r\n\r\n \nEnd"


def read(path: Path, separator: str | None) -> list[str]:
    source = TextSource((path,), document_separator=separator)
    return list(read_documents(source, find_inputs(source).files, ReadCounts()))


@pytest.mark.parametrize(("separator", "documents"), [
    (None, [STORY]),
    ("LINE", ["Once", "upon a time.", "The end.", "<|endoftext|>", "Twice.", "End"]),
    ("BLANK", ["Once\nupon a time.", "The end.\n<|endoftext|>\nTwice.", "End"]),
    (r"\n<\|endoftext\|>\n", ["Once\nupon a time.\n\nThe end.", "Twice.\r\n\r\n \nEnd"]),
    (r"^(?=T)", ["Once\nupon a time.\n\n", "The end.\n<|endoftext|>\n", "Twice.\r\n\r\n \nEnd"]),
])  # fmt: skip
def test_separators(tmp_path: Path, separator: str | None, documents: list[str]) -> None:
    (tmp_path / "a.txt").write_bytes(STORY.encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a\n\nb"}) + "\n")
    assert read(tmp_path, separator) == [*documents, "a\n\nb"]


def test_bad_separators_are_refused_before_anything_else() -> None:
    for separator, message in (
        ("(", "missing \\)"),
        ("", "matches where nothing stands"),
        ("x*", "which is everywhere"),
    ):
        with pytest.raises(UserError, match=f"--document-separator '{re.escape(separator)}': .*{message}"):
            TextSource((Path("nowhere"),), document_separator=separator)


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet="ab\n\u00e9\U0001f642 ", max_size=300),
    separator=st.sampled_from([None, "LINE", "b", "BLANK", r"a(?=\n)", "(?<=a)b"]),
    piece=st.integers(4, 40),
)
def test_a_file_read_in_small_pieces_holds_the_same_documents(text: str, separator: str | None, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "PIECE_BYTES", piece)
        patch.setattr(text_module, "NEAR_BYTES", piece // 2)
        patch.setattr(text_module, "LONGEST_SEPARATOR", 60)
        patch.setattr(text_module, "NAMED_SEPARATORS", {"LINE": r"\r?\n", "BLANK": r"\n(?:[ \t\r]{0,9}\n){1,4}"})
        stream = io.BytesIO(text.encode())
        found = list(documents_of_text(Path("a"), io.BufferedReader(stream), stream, separator))  # type: ignore[type-var]
        pattern = text_module.separator_pattern(separator) if separator else None
    documents: list[str] = []
    for raw in found:
        assert len(raw.content) <= piece
        raw.content.decode()  # cut between characters
        if raw.starts:
            documents.append("")
        documents[-1] += raw.content.decode()
        assert raw.offset == len(documents[-1].encode()) - len(raw.content)
    assert all(before.ends == after.starts for before, after in pairwise(found))
    if pattern is None:
        assert documents == [text]
        return
    expected = pattern.split(text)
    assert documents == (expected[:-1] if len(expected) > 1 and not expected[-1] else expected)


@given(content=st.binary(max_size=200) | st.text(max_size=80).map(str.encode))
def test_pieces_are_the_whole(content: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "PIECE_BYTES", 8)
        patch.setattr(text_module, "NEAR_BYTES", 4)
        pieces = cut_pieces(content)
    assert b"".join(pieces) == content
    assert all(len(piece) <= 8 for piece in pieces)


@given(texts=st.lists(st.text(min_size=2, max_size=40), min_size=1, max_size=4), data=st.data())
def test_dividing_by_position_loses_nothing(texts: list[str], data: st.DataObject) -> None:
    cuts = tuple(data.draw(st.integers(1, len(text.encode()) - 1)) for text in texts)
    pieces = []
    for text in texts:
        content = text.encode()
        at = data.draw(st.integers(0, len(text)))
        halves = [half for half in (text[:at].encode(), text[at:].encode()) if half]
        pieces += [Piece(half, n == 0, n == len(halves) - 1) for n, half in enumerate(halves)]
        assert b"".join(halves) == content
    sided = list(Split(0.1, cuts=cuts).sided(pieces))
    assert b"".join(piece.content for piece, _ in sided) == "".join(texts).encode()
    open_side = None
    for piece, side in sided:
        piece.content.decode()
        assert piece.starts == (open_side is None)
        assert open_side in (None, side)
        open_side = None if piece.ends else side
    assert open_side is None
    assert sum(piece.ends for piece, side in sided if side == "train") == len(texts)


def test_few_documents_are_counted_after_the_filters(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x" * n}) + "\n" for n in range(1, FEW_DOCUMENTS + 5)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    for least, hashed in ((0, True), (5, True), (6, False)):
        source = TextSource((tmp_path / "a.jsonl",), min_document_bytes=least)
        assert plan_split(source, find_inputs(source).files, None).is_hashed == hashed


def test_files_of_a_validation_set_are_one(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"wiki.{name}.txt").write_text("".join(f"{name} {n}\n" for n in range(30)))
    source = TextSource((tmp_path,), document_separator="LINE")
    job = job_of(tmp_path, tmp_path / "out", source=source, valid_fraction=None)
    with pytest.raises(UserError, match=r"wiki\.train\.txt.*split already.*--valid-input.*--valid-fraction F"):
        done(job)
    assert not (tmp_path / "out").exists()
    mixed = done(job_of(tmp_path, tmp_path / "mixed", source=source)).splits
    assert sum(shards.documents for shards in mixed.values()) == 90
    valid = TextSource((tmp_path / "wiki.train.txt",), valid_inputs=(tmp_path / "wiki.valid.txt",),
                       document_separator="LINE")  # fmt: skip
    splits = done(job_of(tmp_path, tmp_path / "given", source=valid, valid_fraction=None)).splits
    assert sorted(texts_of(splits["train"])) == sorted(f"train {n}" for n in range(30))
    assert sorted(texts_of(splits["valid"])) == sorted(f"valid {n}" for n in range(30))
    with pytest.raises(UserError, match=r"--valid-fraction 0\.1: the files of --valid-input are the validation set"):
        done(job_of(tmp_path, tmp_path / "given", source=valid, valid_fraction=0.1))
    # the rest of the folder is for training, and the test set in it is not taken silently
    rest = TextSource((tmp_path,), valid_inputs=(tmp_path / "wiki.valid.txt",))
    with pytest.raises(UserError, match="their names say that they are split already"):
        done(job_of(tmp_path, tmp_path / "rest", source=rest, valid_fraction=None))
    (tmp_path / "wiki.test.txt").unlink()
    splits = done(job_of(tmp_path, tmp_path / "rest", source=rest, valid_fraction=None)).splits
    assert (splits["train"].documents, splits["valid"].documents) == (1, 1)


@pytest.mark.parametrize(("names", "refused"), [
    (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"], True),
    (["train/a.txt", "val/a.txt"], True),
    (["train.txt", "dev.txt"], True),
    (["train.txt", "training.txt"], False),
    (["test_one.txt", "train_two.txt"], False),
    (["trainer.txt", "tester.txt", "contest.txt"], False),
    (["train.txt", "b.txt"], False),
    (["a/test/x.txt", "a/b/y.txt"], False),
])  # fmt: skip
def test_which_names_say_that_they_are_split(tmp_path: Path, names: list[str], refused: bool) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n" if name.endswith("l") else name)
    source = TextSource((tmp_path,))
    files = find_inputs(source).files
    if refused:
        with pytest.raises(UserError, match="split already"):
            plan_split(source, files, None)
    else:
        plan_split(source, files, None)
    assert plan_split(source, files, 0.1).valid_fraction == 0.1


def test_duplicates_across_a_given_split_stay_in_validation(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(50)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(10)))
    source = TextSource((tmp_path / "a.jsonl",), valid_inputs=(tmp_path / "b.jsonl",))
    splits = done(job_of(tmp_path, tmp_path / "out", source=source, valid_fraction=None, deduplicate=True)).splits
    assert (splits["train"].documents, splits["valid"].documents) == (40, 10)


def test_the_tool_takes_one_file_and_an_official_split(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("".join(f"{n}: To be, or not to be.\n" for n in range(400)))
    (tmp_path / "official.txt").write_text("That is the question.\n")
    tool, lone = "tools/prepare_data.py", str(tmp_path / "input.txt")
    run_python(tool, "--input", lone, "--output", str(tmp_path / "one"))
    assert "the last 0.05 of each document" in (tmp_path / "one" / "dataset.md").read_text()
    valid = ("--valid-input", str(tmp_path / "official.txt"), "--document-separator", "LINE")
    run_python(tool, "--input", lone, *valid, "--output", str(tmp_path / "two"))
    assert json.loads((tmp_path / "two" / "valid" / "index.json").read_text())["documents"] == 1
    assert json.loads((tmp_path / "two" / "train" / "index.json").read_text())["documents"] == 400
