"""Users' labelled files: what is read is what is there, whatever holds it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megassm.data.task import Example, Task
from megassm.data.tasks.from_files import Kind, Labelled, labelled_task
from megassm.errors import UserError

RANDOM = np.random.default_rng(4)
GREYS = RANDOM.integers(0, 256, (6, 4, 5), dtype=np.uint8)


def contents(task: Task, examples: Iterable[Example]) -> list[tuple[str, bytes]]:
    """(label, bytes) of the examples, sorted."""
    return sorted(
        (task.answers[int(example.asked[0])], (example.seen - task.first_symbol).astype(np.uint8).tobytes())
        for example in examples
    )


def read(kind: Kind, *places: Path, length: int | None = None) -> tuple[Task, list[tuple[str, bytes]]]:
    """All examples of the two splits together."""
    task, splits = labelled_task(Labelled(kind, places), length, seed=1)
    return task, sorted(contents(task, splits["train"]) + contents(task, splits["valid"]))


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_text_from_lines_and_from_folders_is_the_same(tmp_path: Path) -> None:
    texts = [("good", "a fine film"), ("bad", "dull \u00e9 and long"), ("good", "yes"), ("bad", "no")]
    lines = tmp_path / "reviews.jsonl"
    lines.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for c, t in texts), encoding="utf-8")
    for number, (label, text) in enumerate(texts):
        (tmp_path / "set" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / label / f"{number}.txt").write_text(text, encoding="utf-8")
    expected = sorted((label, text.encode()) for label, text in texts)
    for place in (lines, tmp_path / "set"):
        task, found = read("text", place)
        assert found == expected
        assert (task.length, task.answers) == (4096, ("bad", "good"))
    assert read("text", lines, length=8)[1] == sorted((label, text[:5]) for label, text in expected), "cut to fit"


def test_splits_labels_and_what_is_left_out(tmp_path: Path) -> None:
    for name, count in (("train", 20), ("test", 3)):
        rows = [{"text": f"{name}{number}", "label": "abc"[number % 3]} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    task, splits = labelled_task(Labelled("text", [train], valid_fraction=0.2), None, seed=1)
    parts = {split: {content for _, content in contents(task, found)} for split, found in splits.items()}
    assert (len(parts["train"]), len(parts["valid"])) == (16, 4)
    assert not parts["train"] & parts["valid"]
    task, splits = labelled_task(Labelled("text", [train], [test], labels=["c", "a"]), None, seed=1)
    assert task.answers == ("c", "a")
    assert contents(task, splits["valid"]) == [("a", b"test0"), ("c", b"test2")]
    first = [example.seen.tolist() for example in labelled_task(Labelled("text", [train]), None, 1)[1]["train"]]
    other = [example.seen.tolist() for example in labelled_task(Labelled("text", [train]), None, 2)[1]["train"]]
    assert first != other, "shuffled by the seed"
    assert first == [example.seen.tolist() for example in labelled_task(Labelled("text", [train]), None, 1)[1]["train"]]


def test_images_from_every_kind_of_place_are_the_same_pixels(tmp_path: Path) -> None:
    labels = np.array([0, 1, 1, 0, 1, 0])
    expected = sorted((str(label), image.tobytes()) for label, image in zip(labels.tolist(), GREYS, strict=True))
    for number, (label, image) in enumerate(zip(labels.tolist(), GREYS, strict=True)):
        save(tmp_path / "folders" / str(label) / f"{number}.png", image)
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "images.npy", np.repeat(GREYS[..., None], 3, axis=3))
    np.save(tmp_path / "arrays" / "labels.npy", labels)
    for place in (tmp_path / "folders", tmp_path / "arrays"):
        task, found = read("image", place)
        assert found == expected
        assert task.length == 64


def test_cifar_batches_become_grey(tmp_path: Path) -> None:
    channels = RANDOM.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    batch = {b"data": channels.reshape(6, 3072), b"labels": [3, 1, 3, 1, 3, 1]}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=2))
    task, found = read("image", tmp_path)
    assert task.length == 1088
    for (_, content), image in zip(sorted(found), sorted(_greys(channels)), strict=True):
        mine, theirs = np.frombuffer(content, np.uint8), np.frombuffer(image[1], np.uint8)
        assert np.abs(mine.astype(int) - theirs.astype(int)).max() <= 1, "Pillow's grey, but for rounding"


def _greys(channels: np.ndarray) -> list[tuple[str, bytes]]:
    images = (Image.fromarray(image.transpose(1, 2, 0)).convert("L") for image in channels)
    return [("31"[number % 2], image.tobytes()) for number, image in enumerate(images)]


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(UserError, match="not a batch of CIFAR-10 for Python"):
        read("image", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_pathfinder_by_its_metadata(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    for listing in range(2):
        rows = []
        for sample in range(3):
            save(tmp_path / "imgs" / str(listing) / f"sample_{sample}.png", GREYS[3 * listing + sample])
            rows.append(f"imgs/{listing} sample_{sample}.png {sample} {sample % 2} 1.8 6 2.0 5 1.5 4 1 1")
        (tmp_path / "metadata" / f"{listing}.npy").write_text("\n".join(rows) + "\n", encoding="utf-8")
    _, found = read("pathfinder", tmp_path)
    assert found == sorted((str(number % 3 % 2), image.tobytes()) for number, image in enumerate(GREYS))


def test_what_is_not_there_or_not_right_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read("text", tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no labelled image"):
        read("image", tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.jsonl:2: label: Field required; a line is"):
        read("text", tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").write_text('{"text": "a", "label": 0}\n' * 9, encoding="utf-8")
    with pytest.raises(UserError, match="a task needs two"):
        read("text", tmp_path / "y.jsonl")
    save(tmp_path / "set" / "a" / "1.png", GREYS[0])
    (tmp_path / "set" / "b").mkdir()
    (tmp_path / "set" / "b" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"1\.png: cannot be read as an image"):
        read("image", tmp_path / "set", length=64)
    save(tmp_path / "other" / "c" / "1.png", GREYS[0])
    with pytest.raises(UserError, match=r"--valid-input: labels \['c'\] are not in --input"):
        labelled_task(Labelled("image", [tmp_path / "set"], [tmp_path / "other"]), 64, seed=1)
