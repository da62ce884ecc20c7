"""Exported models under transformers: the same logits, the same texts token for token, the same ids; offline."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megassm.checkpoint.exported import open_model_folder, write_model_folder
from megassm.checkpoint.format import load_model
from megassm.data.tokenizer.base import EOD_PIECE, PROBE, load_tokenizer, train_sentencepiece
from megassm.errors import UserError
from megassm.eval.generate import generate
from megassm.eval.sampling import Sampling
from megassm.eval.session import open_session
from megassm.export.write import ExportPlan, export_models
from megassm.model import LanguageModel, build_model, losses_at
from tests.conftest import run_python
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
    """The hybrid has heads, an unnormalised gate, taps and a past that fades."""
    heads = {"mixer_heads": 4, "gate": "sigmoid", "input_taps": 3, "selective": True} if "A" in pattern else {}
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
    assert torch.equal(load_model(open_model_folder(tmp_path)).embedding_VD, model.model.embed_tokens.weight)
    assert (tmp_path / "modeling_megassm.py").read_text() == (
        Path(hf_model.__file__).parent / "modeling_megassm.py"
    ).read_text()
    assert (
        json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_megassm.MegaSSMModel"
    )


def test_saved_in_several_files(pair: tuple[LanguageModel, Any, Any], tmp_path: Path) -> None:
    ours, model, _ = pair
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = load_model(open_model_folder(tmp_path))
    for name, value in ours.named_parameters():
        assert torch.equal(found.get_parameter(name), value), name
    index = tmp_path / "model.safetensors.index.json"
    whole = index.read_text()
    for damage in (whole.replace('": "model-00001', '": "../model-00001'), "[]", "{}", "x"):
        index.write_text(damage)
        with pytest.raises(UserError, match=r"index\.json: not an index of weights .*save the model again"):
            load_model(open_model_folder(tmp_path))
    index.write_text(whole)
    next(tmp_path.glob("*-00002-*")).unlink()
    with pytest.raises(UserError, match=r"00002.*No such file.*names it"):
        load_model(open_model_folder(tmp_path))


def test_a_new_model_starts_as_in_training(pair: tuple[LanguageModel, Any, Any]) -> None:
    from transformers import AutoModelForCausalLM

    ours, model, _ = pair
    fresh: Any = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    for name, value in ours.named_parameters():
        hub_name, hub_value = hub_form(name, value, ours.config)
        assert torch.equal(fresh.model.get_parameter(hub_name), hub_value), name


COMPILE_CHECK = """
import sys, torch
from transformers import AutoModelForCausalLM
import megassm
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
text, mask = torch.randint(0, 256, (2, 40)), torch.ones(2, 40, dtype=torch.long)
mask[0, :7] = 0
compiled = torch.compile(model, fullgraph=True, backend="eager")
for given in (None, mask):
    asked = {"attention_mask": given, "use_cache": False, "k": 3, "labels": text}
    found, expected = compiled(text, **asked), model(text, **asked)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5) and torch.allclose(found.loss, expected.loss)

class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask, use_cache=False).logits

free = {0: torch.export.Dim("B", min=1, max=64), 1: torch.export.Dim("L", min=2, max=64)}
program = torch.export.export(Logits(), (text, mask), dynamic_shapes=(free, free)).module()
for batch, length in ((2, 40), (3, 9), (5, 64)):
    text, mask = torch.randint(0, 256, (batch, length)), torch.ones(batch, length, dtype=torch.long)
    mask[1, :5] = 0
    assert torch.allclose(program(text, mask), Logits()(text, mask), atol=1e-5)
"""


def test_one_graph_with_and_without_a_mask_and_a_program_of_any_length(tmp_path: Path) -> None:
    write_model_folder(tmp_path, random_model("SA"), load_tokenizer("bytes"), torch.float32)
    run_python("-c", COMPILE_CHECK, str(tmp_path), TORCHDYNAMO_DISABLE="0")


KNOWN_CHECK = """
import sys
{first}
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
{last}
kinds = (AutoTokenizer, AutoModel, AutoModelForCausalLM)
print(*(type(kind.from_pretrained(sys.argv[1])).__name__ for kind in kinds))
"""


@pytest.mark.parametrize("first", [True, False])
def test_importing_the_package_is_enough(first: bool, tmp_path: Path) -> None:
    write_model_folder(tmp_path, random_model("S"), load_tokenizer("bytes"), torch.float32)
    light = "import megassm; assert not {'torch', 'transformers'} & sys.modules.keys()"
    check = KNOWN_CHECK.format(first=light if first else "", last="" if first else "import megassm")
    done = run_python("-c", check, str(tmp_path))
    assert done.stdout == "MegaSSMTokenizer MegaSSMModel MegaSSMForCausalLM\n"


@pytest.mark.parametrize("tied", [True, False])
def test_a_files_tensors_are_taken_as_they_are(tied: bool, tmp_path: Path) -> None:
    """The Trainer resumes so; a classifier's head is another name in the file."""
    from safetensors.torch import load_file

    ours = build_model(config(vocab_size=300, mixer_heads=4, tie_embeddings=tied), 3).eval()
    write_model_folder(tmp_path, ours, load_tokenizer("bytes"), torch.float32)
    settings = hf_model.MegaSSMConfig.from_pretrained(tmp_path)
    ids = torch.randint(0, 256, (2, 20))
    for model_class in (hf_model.MegaSSMForCausalLM, hf_model.MegaSSMForSequenceClassification):
        # an untied model's own head has its vocabulary's rows, no classifier's
        model = model_class.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=not tied).eval()
        model.save_pretrained(tmp_path / "again")
        other = model_class(model.config).eval()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not any(other.load_state_dict(load_file(tmp_path / "again/model.safetensors"), strict=False))
        assert torch.equal(other(ids).logits, model(ids).logits)
    assert settings.hidden_size == ours.config.d_model


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
