"""What is exported opens under transformers for what it is: language models of every kind, classifiers, models of other
tasks, folders of earlier versions; chat templates and added tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megassm.checkpoint.exported import open_model_folder, write_model_folder
from megassm.checkpoint.format import load_model
from megassm.data.task import Task, TaskTokenizer
from megassm.data.tasks.from_files import byte_name
from megassm.data.tokenizer.base import EOD_PIECE, load_tokenizer
from megassm.errors import UserError
from megassm.export.chat import read_chat_template
from megassm.model import LanguageModel, build_model
from tests.conftest import ROOT
from tests.test_model import config

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

KINDS: dict[str, dict[str, Any]] = {
    "pure": {"pattern": "S"},
    "hybrid": {"mixer_heads": 4, "gate": "sigmoid", "input_taps": 3, "window": 20},
    "elastic width": {"d_ffn": 60, "ffn_elastic": {"knee_k": 3, "below": 16, "above": 8}},
    "alternating": {"basis": "alternating", "mixer_heads": 2, "gate": "sigmoid"},
    "hankel_l": {"basis": "hankel_l", "pattern": "S"},
    "selective": {"selective": True, "mixer_heads": 4, "gate": "sigmoid", "input_taps": 3},
    "untied": {"tie_embeddings": False, "sigma_scale": "none"},
}
TEXTS = ["a fine film", "no", "neither good nor bad"]
REVIEWS = TaskTokenizer(Task("text", 64, ("bad", "good", "pad"), tuple(map(byte_name, range(256)))))
RECALL = TaskTokenizer(Task("recall", 32, tuple(f"v{i}" for i in range(4)), tuple(f"k{i}" for i in range(8)), 2))
CHAT = "{% for m in messages %}{{ '<|user|>' if m.role == 'user' }}{{ m.content }}{{ eos_token }}{% endfor %}"


def written(folder: Path, tokenizer: Any, **knobs: Any) -> LanguageModel:
    ours = build_model(config(seq_len=64, **{"vocab_size": 300, **knobs}), 0).eval()
    write_model_folder(folder, ours, tokenizer, torch.float32)
    return ours


def opened(kind: str, folder: Path, **options: Any) -> Any:
    model = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True, **options)
    return model.eval() if isinstance(model, torch.nn.Module) else model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_training_code(kind: str, tmp_path: Path) -> None:
    ours = written(tmp_path, load_tokenizer("bytes"), **KINDS[kind])
    model = opened("AutoModelForCausalLM", tmp_path)
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))
    for k in (1, 3, 6):
        assert torch.equal(model(ids, k=k).logits, ours(ids, k)), k
        assert torch.equal(opened("AutoModelForCausalLM", tmp_path, k=k)(ids).logits, ours(ids, k))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LanguageModel]:
    folder = tmp_path_factory.mktemp("classifier")
    return folder, written(folder, REVIEWS, classes=3, pattern="SA", mixer_heads=2)


def labelled(text: str) -> Tensor:
    """An example as in training: the label and padding follow what is seen."""
    ids = [*REVIEWS.content(text), REVIEWS.task.separator, 1]
    return torch.tensor([ids + [REVIEWS.task.pad] * (63 - len(ids))])


def test_a_model_of_classes_is_a_classifier(classifier: tuple[Path, LanguageModel], tmp_path: Path) -> None:
    folder, ours = classifier
    model, tokenizer = opened("AutoModelForSequenceClassification", folder), opened("AutoTokenizer", folder)
    assert type(model).__name__ == "MegaSSMForSequenceClassification"
    assert model.config.id2label == {0: "bad", 1: "good", 2: "pad"}
    assert tokenizer(TEXTS[1])["input_ids"] == REVIEWS.content("no").tolist()
    assert (tokenizer.decode(REVIEWS.content("no")), tokenizer.model_max_length) == ("no", 61)
    for k in (1, 3, 6):
        expected_BC = torch.cat([ours(labelled(text), k)[:, 0] for text in TEXTS])
        assert torch.equal(model(labelled(TEXTS[0]), k=k).logits, expected_BC[:1])
        for side in ("left", "right"):
            batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side=side)
            assert torch.allclose(model(**batch, k=k).logits, expected_BC, atol=1e-6), side
    labels = torch.tensor([0, 1, 2])
    loss = model(**batch, labels=labels).loss
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(expected_BC, labels))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = open_model_folder(tmp_path)
    assert again.tokenizer().sha256 == REVIEWS.sha256
    assert torch.equal(load_model(again)(labelled("no"), 3), ours(labelled("no"), 3))


def test_a_classifier_answers_by_name(classifier: tuple[Path, LanguageModel]) -> None:
    folder, ours = classifier
    answers = transformers.pipeline("text-classification", model=str(folder), trust_remote_code=True)(TEXTS)
    names = [REVIEWS.task.answers[int(ours(labelled(text)).argmax())] for text in TEXTS]
    assert [answer["label"] for answer in answers] == names
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        opened("AutoModelForSequenceClassification", folder, num_labels=5)


def test_a_model_that_answers_by_tokens_generates_them(tmp_path: Path) -> None:
    ours = written(tmp_path, RECALL, vocab_size=16)
    model, tokenizer = opened("AutoModelForCausalLM", tmp_path), opened("AutoTokenizer", tmp_path)
    prompt = tokenizer("k1 v3 k7 v0 => k7", return_tensors="pt")
    assert prompt["input_ids"].tolist() == [[8, 3, 14, 0, 4, 14]]
    assert tokenizer.decode(prompt["input_ids"][0]) == "k1 v3 k7 v0 => k7"
    drawn = model.generate(**prompt, max_new_tokens=1)[0, -1]
    assert drawn == ours(prompt["input_ids"]).argmax(-1)[0, -1]
    with pytest.raises(UserError, match="task 'recall' has no symbol 'k9'; it has k0 k1"):
        tokenizer("k9")


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_is_opened_as_a_new_classifier(tied: bool, tmp_path: Path) -> None:
    written(tmp_path, load_tokenizer("bytes"), tie_embeddings=tied)
    kind = "AutoModelForSequenceClassification"
    model = opened(kind, tmp_path, num_labels=3, pad_token_id=256)
    causal = opened("AutoModelForCausalLM", tmp_path)
    ids = torch.tensor([[*b"good", 256, 256]])
    (hidden,) = causal.model(ids[:, :4]).last_hidden_state[:, -1]
    assert model.score.weight.std() < 0.1
    assert torch.allclose(model(ids).logits[0], model.score.weight @ hidden, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(opened(kind, tmp_path / "saved")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["first", "heads"])
def test_folders_of_earlier_versions_open(name: str, tmp_path: Path) -> None:
    """ "first" is of the version that exported first, "heads" of the last before the native classes, untied."""
    shutil.unpack_archive(ROOT / "tests/exports.zip", tmp_path)
    folder = tmp_path / name
    expected = json.loads((folder / "logits.json").read_text())
    ids = torch.tensor([list(b"def f(x): return x + 1 # and on for more than 32")])
    ours = load_model(open_model_folder(folder))
    theirs = opened("AutoModelForCausalLM", folder, dtype=torch.float32)
    for k, rows in expected.items():
        for logits in (ours(ids, int(k)), theirs(ids, k=int(k)).logits):
            assert torch.allclose(logits[0, [0, 20, 47], :4], torch.tensor(rows), atol=2e-6)
    tokenizer = opened("AutoTokenizer", folder)
    assert tokenizer("def")["input_ids"] == list(b"def")
    half = opened("AutoModelForCausalLM", folder)
    assert half.dtype == torch.bfloat16
    assert half.generate(ids, max_new_tokens=3).shape == (1, 51)


def test_a_chat_template_goes_with_the_model(tmp_path: Path) -> None:
    ours = build_model(config(vocab_size=300), 0)
    (tmp_path / "chat.jinja").write_text(CHAT)
    template = read_chat_template(tmp_path / "chat.jinja")
    (tmp_path / "model").mkdir()
    write_model_folder(tmp_path / "model", ours, load_tokenizer("bytes"), torch.float32, template)
    tokenizer = opened("AutoTokenizer", tmp_path / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.add_tokens(["<tool>"])
    turns = [{"role": "user", "content": f"hi {EOD_PIECE}"}, {"role": "assistant", "content": "yes"}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    assert ids == [257, *b"hi ", 256, 256, *b"yes", 256]
    safe = tokenizer.apply_chat_template(turns, return_dict=False, sanitize_control_tokens=True)
    assert safe == [257, *b"hi ", *EOD_PIECE.encode(), 256, *b"yes", 256]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == f"<|user|>hi {EOD_PIECE}{EOD_PIECE}yes{EOD_PIECE}"
    text = f"a<tool>{EOD_PIECE}<|user|> {EOD_PIECE}"
    assert tokenizer(text)["input_ids"] == [97, 258, *EOD_PIECE.encode(), 257, 32, *EOD_PIECE.encode()]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    tokenizer.save_pretrained(tmp_path / "saved")
    again = opened("AutoTokenizer", tmp_path / "saved")
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.apply_chat_template(turns, return_dict=False) == ids


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}", r"chat\.jinja:1: Unexpected end"),
        (b"\xff", r"chat\.jinja: not UTF-8"),
        (None, r"--chat-template .*chat\.jinja: No such file"),
    ],
)
def test_what_is_no_chat_template(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "chat.jinja").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_chat_template(tmp_path / "chat.jinja")
