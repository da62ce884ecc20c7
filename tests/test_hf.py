"""Exported models under transformers: the same logits, the same texts token for token, the same ids; offline."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megassm.checkpoint.exported import open_model_folder, write_model_folder
from megassm.data.tokenizer.base import EOD_PIECE, PROBE, load_tokenizer, train_sentencepiece
from megassm.errors import UserError
from megassm.eval.generate import generate
from megassm.eval.sampling import Sampling
from megassm.eval.session import open_session
from megassm.export.write import ExportPlan, export_models
from megassm.model import LanguageModel, build_model, losses_at
from tests.test_model import config

pytest.importorskip("transformers", reason="needs the extra 'hf'")

import megassm.hf as hf_model
from megassm.hf.weights import hub_form

TEXTS = ["def hello(world):\n", "  a", f"caf\u00e9 {EOD_PIECE} x"]


def opened(folder: Path, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@lru_cache
def random_model(pattern: str) -> LanguageModel:
    """The hybrid has heads, an unnormalised gate and taps."""
    heads = {"mixer_heads": 4, "gate": "sigmoid", "input_taps": 3} if "A" in pattern else {}
    return build_model(config(vocab_size=300, pattern=pattern, seq_len=64, window=20, **heads), 0).eval()


@pytest.fixture(scope="module", params=["S", "SA"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Any, Any]:
    """(our model, the same under transformers, its tokenizer)."""
    folder = tmp_path_factory.mktemp(request.param)
    ours = random_model(request.param)
    write_model_folder(folder, ours, load_tokenizer("bytes"), torch.float32)
    return (ours, *opened(folder))


def prompts(tokenizer: Any) -> Any:
    return tokenizer(TEXTS, return_tensors="pt", padding=True)


def continuations(model: Any, batch: Any, **options: Any) -> list[list[int]]:
    """Greedy, without the end of the document and what follows it."""
    drawn = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: row.index(256)] if 256 in row else row for row in drawn]


def test_a_trained_export_generates_what_megassm_does(trained: Path, tmp_path: Path) -> None:
    session = open_session(trained, None, "cpu")
    export_models(session, {4: tmp_path / "k-4"}, ExportPlan(sequences=2))
    model, tokenizer = opened(tmp_path / "k-4")
    ids = [session.tokenizer.encode([text])[0].tolist() for text in TEXTS]
    expected = generate(session.model, ids, 4, Sampling(40, temperature=0, stop_ids=[session.tokenizer.eod]))
    assert continuations(model, prompts(tokenizer), max_new_tokens=40) == expected


def test_greedy_texts_of_a_left_padded_batch(pair: tuple[LanguageModel, Any, Any]) -> None:
    ours, model, tokenizer = pair
    batch = prompts(tokenizer)
    assert batch["attention_mask"].sum(1).tolist() == [len(text.encode()) for text in TEXTS]
    for k in (2, 6):
        expected = generate(ours, [list(text.encode()) for text in TEXTS], k, Sampling(30, 0, stop_ids=[256]))
        assert continuations(model, batch, max_new_tokens=30, k=k) == expected
        assert continuations(model, batch, max_new_tokens=30, k=k, use_cache=False) == expected


def test_beams_and_samples_do_not_depend_on_the_cache(pair: tuple[LanguageModel, Any, Any]) -> None:
    _, model, tokenizer = pair
    for options in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}):
        drawn = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            drawn.append(model.generate(**prompts(tokenizer), **options, max_new_tokens=12, use_cache=use_cache))
        assert torch.equal(*drawn)


def test_the_cache_has_a_constant_size_and_can_be_continued(pair: tuple[LanguageModel, Any, Any]) -> None:
    _, model, tokenizer = pair
    batch = prompts(tokenizer)
    sizes, texts = [], []
    for tokens in (25, 50):
        done = model.generate(**batch, max_new_tokens=tokens, return_dict_in_generate=True)
        sizes.append(done.past_key_values.nbytes)
        texts.append(done)
    assert sizes[0] == sizes[1]
    cut = texts[0].sequences
    mask = torch.cat((batch["attention_mask"], torch.ones(3, cut.shape[1] - batch["input_ids"].shape[1])), dim=1)
    cache = texts[0].past_key_values
    more = model.generate(cut, attention_mask=mask.long(), past_key_values=cache, max_new_tokens=10)
    assert torch.equal(more, texts[1].sequences[:, : more.shape[1]])


def test_logits_and_loss(pair: tuple[LanguageModel, Any, Any]) -> None:
    ours, model, tokenizer = pair
    batch = prompts(tokenizer)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    done = model(**batch, labels=labels)
    nll, count = 0.0, 0
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([list(text.encode())])
        logits = ours(ids, 6)
        assert torch.allclose(done.logits[row, -ids.shape[1] :], logits[0], atol=1e-5)
        nll += float(losses_at(ours, ids, 6).sum().detach())
        count += ids.shape[1] - 1
    assert float(done.loss.detach()) == pytest.approx(nll / count, rel=1e-4)
    right = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    assert torch.allclose(model(**right).logits[1, :3], done.logits[1, -3:], atol=1e-5)
    assert model(**batch, logits_to_keep=2).logits.shape == (3, 2, 300)


def test_refused_padding(pair: tuple[LanguageModel, Any, Any]) -> None:
    _, model, tokenizer = pair
    right = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    with pytest.raises(UserError, match="padding_side = 'left'"):
        model.generate(**right, max_new_tokens=2)
    ids = torch.tensor([[1, 2, 3]])
    for mask in ([[1, 0, 1]], [[0, 0, 0]]):
        with pytest.raises(UserError, match="pad on one side"):
            model(ids, attention_mask=torch.tensor(mask))
    with pytest.raises(UserError, match="must be equal"):
        model(ids, attention_mask=torch.ones(1, 4))


def test_bfloat16_keeps_the_filters(pair: tuple[LanguageModel, Any, Any], tmp_path: Path) -> None:
    ours, whole, tokenizer = pair
    write_model_folder(tmp_path, ours, load_tokenizer("bytes"), torch.bfloat16)
    rounded, _ = opened(tmp_path)
    cast = opened(tmp_path, dtype=torch.float32)[0].to(torch.bfloat16)  # casts what it can, filters too
    batch = prompts(tokenizer)
    expected = whole(**batch).logits
    for model in (rounded, cast):
        assert model.dtype == torch.bfloat16
        found = model(**batch).logits.float()
        assert torch.linalg.vector_norm(found - expected) < 0.02 * torch.linalg.vector_norm(expected)
        assert model.model.filterbank.filters_LK.dtype == torch.float64
        assert model.generate(**batch, max_new_tokens=3).shape == (3, batch["input_ids"].shape[1] + 3)


def test_saved_again_by_transformers(pair: tuple[LanguageModel, Any, Any], tmp_path: Path) -> None:
    _, model, tokenizer = pair
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = opened(tmp_path)
    batch = prompts(tokenizer_again)
    assert torch.equal(again(**batch).logits, model(**prompts(tokenizer)).logits)
    assert torch.equal(open_model_folder(tmp_path).load_model().embedding_VD, model.model.embed_tokens.weight)
    assert (tmp_path / "modeling_megassm.py").read_text() == (
        Path(hf_model.__file__).parent / "modeling_megassm.py"
    ).read_text()
    assert (
        json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_megassm.MegaSSMModel"
    )


def test_a_new_model_starts_as_in_training(pair: tuple[LanguageModel, Any, Any]) -> None:
    from transformers import AutoModelForCausalLM

    ours, model, _ = pair
    fresh: Any = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    for name, value in ours.named_parameters():
        hub_name, hub_value = hub_form(name, value, ours.config)
        assert torch.equal(fresh.model.get_parameter(hub_name), hub_value), name


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(["def hello(world):\n  return world"] * 50 + [PROBE], 300))
    return path


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_tokenizer_is_exact(kind: str, sentencepiece_path: Path, tmp_path: Path) -> None:
    ours = load_tokenizer("bytes" if kind == "bytes" else sentencepiece_path)
    write_model_folder(tmp_path, random_model("S"), ours, torch.float32)
    model, tokenizer = opened(tmp_path)
    assert len(tokenizer) == tokenizer.vocab_size == ours.vocab_size
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.generation_config.eos_token_id == ours.eod
    for text in (*TEXTS, PROBE, " ", "", "world \n\n", f"{EOD_PIECE}{EOD_PIECE}"):
        ids = ours.encode([text])[0].tolist()
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, ours.eod], skip_special_tokens=True) == text
    assert tokenizer.decode([299]) == "" or kind == "sentencepiece"  # an id of the model that stands for nothing
    tokenizer.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.model").exists() == (kind == "sentencepiece")


def test_tokenizer_json_is_read_by_transformers_itself(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["</s>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "model").mkdir()
    write_model_folder(tmp_path / "model", random_model("S"), ours, torch.float32)
    assert open_model_folder(tmp_path / "model").tokenizer().sha256 == ours.sha256
    _, tokenizer = opened(tmp_path / "model")
    assert tokenizer.is_fast
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == ours.eod == 256
    for text in ("def f(x):\n  return x", PROBE):
        assert tokenizer(text)["input_ids"] == ours.encode([text])[0].tolist()
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
