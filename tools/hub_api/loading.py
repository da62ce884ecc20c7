"""Devices, dtypes, files, compilers, pipelines."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import nn

from tools.hub_api.subject import LAYERS, TEXTS, Subject, check, near, same


def _close_in(s: Subject, model: Any, limit: float) -> None:
    """Logits within a share of their norm, and generates."""
    exact, found = s.logits(), s.logits(model).float()
    assert torch.isfinite(found).all()
    assert float((found - exact).norm() / exact.norm()) < limit
    same(s.greedy(model).shape, torch.Size((2, 38)))


@check("bfloat16, opened and cast")
def _bfloat16(s: Subject) -> None:
    _close_in(s, s.load(dtype=torch.bfloat16), 0.03)
    _close_in(s, s.load().to(torch.bfloat16), 0.03)


@check("float16")
def _float16(s: Subject) -> None:
    _close_in(s, s.load(dtype=torch.float16), 0.01)


@check("float64")
def _float64(s: Subject) -> None:
    _close_in(s, s.load(dtype=torch.float64), 1e-4)


@check("autocast")
def _autocast(s: Subject) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _close_in(s, s.load(), 0.03)


@check("dtype auto, of a saved half")
def _auto_dtype(s: Subject) -> None:
    folder = s.new_folder()
    s.load(dtype=torch.bfloat16).save_pretrained(folder)
    same(s.load(folder=folder, dtype="auto").dtype, torch.bfloat16)


@check("device_map auto and cpu")
def _device_map(s: Subject) -> None:
    for device_map in ("auto", {"": "cpu"}):
        same(s.greedy(s.load(device_map=device_map)), s.greedy())


@check("device_map with parts on disk")
def _disk(s: Subject) -> None:
    blocks = "model.layers" if s.kind == "Llama" else "model.blocks"
    rest = {name: "cpu" for name, _ in s.model.model.named_children() if f"model.{name}" != blocks}
    device_map = {f"model.{name}": place for name, place in rest.items()} | {"lm_head": "cpu"}
    device_map |= {f"{blocks}.{i}": "disk" if i in (1, 2) else "cpu" for i in range(LAYERS)}
    same(s.greedy(s.load(device_map=device_map, offload_folder=str(s.new_folder()))), s.greedy())


@check("made on the meta device")
def _meta(s: Subject) -> None:
    with torch.device("meta"):
        model = s.new()
    same(model.num_parameters(), s.model.num_parameters())
    assert model.get_input_embeddings().weight.is_meta


@check("moved to a CUDA device")
def _cuda(s: Subject) -> None:
    near(s.logits(s.load().to("cuda"), s.ids.to("cuda")).cpu(), s.logits(), 1e-4)


@check("new from a configuration")
def _new(s: Subject) -> None:
    model = s.new()
    assert torch.isfinite(s.logits(model.eval())).all()
    same(model.config.hidden_size, 64)


@check("saved whole and in parts, and opened")
def _saved(s: Subject) -> None:
    for size in ("5GB", "100KB"):
        folder = s.new_folder()
        s.load().save_pretrained(folder, max_shard_size=size)
        same(s.logits(s.load(folder=folder)), s.logits())


@check("nothing missing or left over in the file")
def _complete(s: Subject) -> None:
    from transformers import AutoModelForCausalLM

    opened: Any = AutoModelForCausalLM.from_pretrained(s.folder, output_loading_info=True)
    _, seen = opened
    same([list(seen[what]) for what in ("missing_keys", "unexpected_keys", "mismatched_keys")], [[], [], []])


@check("state_dict, deepcopy, pickle")
def _copies(s: Subject) -> None:
    other = s.load()
    with torch.no_grad():
        other.get_input_embeddings().weight.zero_()
    other.load_state_dict(s.model.state_dict())
    for model in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        same(s.logits(model), s.logits())


@check("AutoModel and AutoModelForSequenceClassification")
def _other_heads(s: Subject) -> None:
    with torch.no_grad():
        states = s.load("AutoModel")(s.ids).last_hidden_state
        near(s.model.lm_head(states), s.logits())
        scores = s.load("AutoModelForSequenceClassification", num_labels=3, pad_token_id=256)(s.ids).logits
    same(scores.shape, torch.Size((2, 3)))


@check("torch.compile, the whole graph")
def _compiled(s: Subject) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(s.load(), fullgraph=True, backend="eager")
    near(s.logits(compiled, use_cache=False), s.logits())


@check("torch.export")
def _exported(s: Subject) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = s.load()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids, attention_mask, use_cache=False).logits

    program = torch.export.export(Logits(), (s.ids, torch.ones_like(s.ids)))
    near(program.module()(s.ids, torch.ones_like(s.ids)), s.logits())


@check("dynamic int8 of torch")
def _dynamic_int8(s: Subject) -> None:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    model = quantize(s.load(), {nn.Linear}, dtype=torch.qint8)
    _close_in(s, model, 0.1)


@check("pipeline of text, one and many")
def _pipeline(s: Subject) -> None:
    from transformers import pipeline

    write = pipeline("text-generation", model=s.load(), tokenizer=s.tokenizer)
    options = {"max_new_tokens": 4, "do_sample": False}
    for text, [found] in zip(TEXTS, write(TEXTS, batch_size=2, **options), strict=True):
        assert found["generated_text"].startswith(text)
        same(found["generated_text"], write(text, **options)[0]["generated_text"])


@check("pipeline of a chat")
def _chat(s: Subject) -> None:
    from transformers import pipeline

    from megassm.hf import MegaSSMTokenizer

    tokenizer = MegaSSMTokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    write = pipeline("text-generation", model=s.load(), tokenizer=tokenizer)
    [found] = write([{"role": "user", "content": "Who?"}], max_new_tokens=4, do_sample=False)
    same(found["generated_text"][-1]["role"], "assistant")


@check("pipeline of features")
def _features(s: Subject) -> None:
    from transformers import pipeline

    found = pipeline("feature-extraction", model=s.load("AutoModel"), tokenizer=s.tokenizer)("abc")
    same((len(found[0]), len(found[0][0])), (3, 64))
