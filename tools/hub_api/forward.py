"""One forward pass: padding, packing, losses, outputs, embeddings; training by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.hub_api.generation import cache_of
from tools.hub_api.subject import VOCABULARY, WIDTH, Subject, check, near, same


def _padded_is_alone(s: Subject, side: str) -> None:
    batch = s.padded(side)
    logits = s.logits(ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for row, mask in enumerate(batch["attention_mask"].bool()):
        near(logits[row, mask], s.logits(ids=batch["input_ids"][row : row + 1, mask])[0])


@check("padding on the left")
def _left(s: Subject) -> None:
    _padded_is_alone(s, "left")


@check("padding on the right")
def _right(s: Subject) -> None:
    _padded_is_alone(s, "right")


@check("a mask of ones")
def _ones(s: Subject) -> None:
    near(s.logits(attention_mask=torch.ones_like(s.ids)), s.logits())


@check("texts packed by position_ids")
def _packed(s: Subject) -> None:
    positions = torch.cat((torch.arange(18), torch.arange(12)))[None]
    packed = s.logits(ids=s.ids[:1], position_ids=positions, use_cache=False)
    near(packed[:, :18], s.logits(ids=s.ids[:1, :18]))
    near(packed[:, 18:], s.logits(ids=s.ids[:1, 18:]))


@check("a mask of four dimensions")
def _four_dimensions(s: Subject) -> None:
    hidden_BGLT = torch.ones(2, 1, 30, 30, dtype=torch.bool).triu(1)
    near(s.logits(attention_mask=torch.zeros(2, 1, 30, 30).masked_fill(hidden_BGLT, -torch.inf)), s.logits())


@check("read token by token, and in parts")
def _stepped(s: Subject) -> None:
    for size in (1, 7):
        cache, found = None, []
        for part in torch.split(s.ids, size, dim=1):
            with torch.no_grad():
                output = s.model(part, past_key_values=cache, use_cache=True)
            cache = cache_of(output)
            found.append(output.logits)
        near(torch.cat(found, dim=1), s.logits())


@check("the last logits only, or some")
def _kept(s: Subject) -> None:
    near(s.logits(logits_to_keep=2), s.logits()[:, -2:])
    near(s.logits(logits_to_keep=torch.tensor([0, 5])), s.logits()[:, [0, 5]])


@check("the loss, ignored labels, a count of items")
def _loss(s: Subject) -> None:
    labels = s.ids.clone()
    labels[:, :10] = -100
    expected = F.cross_entropy(s.logits()[:, 9:-1].flatten(0, 1), labels[:, 10:].flatten(), reduction="sum")
    near(s.model(s.ids, labels=labels).loss, expected / 40)
    near(s.model(s.ids, labels=labels, num_items_in_batch=160).loss, expected / 160)


@check("outputs as a tuple")
def _tuple(s: Subject) -> None:
    loss, logits, *_ = s.model(s.ids, labels=s.ids, return_dict=False)
    same((loss.dim(), logits.shape), (0, torch.Size((2, 30, VOCABULARY))))


@check("hidden states, all or some")
def _states(s: Subject) -> None:
    with torch.no_grad():
        states = s.model(s.ids, output_hidden_states=True).hidden_states
        same(len(states), 5)
        near(s.model.lm_head(states[-1]), s.logits())
        some = s.model(s.ids, output_hidden_states=[0, -1]).hidden_states
    same([state is None for state in some], [False, True, True, True, False])


@check("attention weights")
def _weights(s: Subject) -> None:
    with torch.no_grad():
        (first, *_) = s.load(attn_implementation="eager")(s.ids, output_attentions=True).attentions
    same(first.shape, torch.Size((2, 4, 30, 30)))
    near(first.sum(-1), torch.ones(2, 4, 30))


def _implementation(s: Subject, name: str) -> None:
    near(s.logits(s.load(attn_implementation=name)), s.logits())


@check("attn_implementation eager and sdpa")
def _eager(s: Subject) -> None:
    for name in ("eager", "sdpa"):
        _implementation(s, name)


@check("attn_implementation flex_attention")
def _flex(s: Subject) -> None:
    _implementation(s, "flex_attention")


@check("attn_implementation flash_attention_2")
def _flash(s: Subject) -> None:
    _implementation(s, "flash_attention_2")


@check("embeddings in place of ids")
def _embeddings(s: Subject) -> None:
    embedded = s.model.get_input_embeddings()(s.ids)
    near(s.model(inputs_embeds=embedded).logits, s.logits())
    for both_or_none in ({}, {"input_ids": s.ids, "inputs_embeds": embedded}):
        try:
            s.model(**both_or_none)
        except ValueError:
            continue
        raise AssertionError("not refused")


@check("embeddings got, set and tied")
def _tied(s: Subject) -> None:
    model = s.load()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.set_input_embeddings(nn.Embedding(VOCABULARY, WIDTH))
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@check("embeddings resized, saved and opened")
def _resized(s: Subject) -> None:
    model, folder = s.load(), s.new_folder()
    model.resize_token_embeddings(305, pad_to_multiple_of=8)
    same((model.config.vocab_size, model.lm_head.weight.shape[0]), (312, 312))
    near(s.logits(model)[..., :VOCABULARY], s.logits())
    model.save_pretrained(folder)
    near(s.logits(s.load(folder=folder)), s.logits(model))
    model.resize_token_embeddings(280)
    near(s.logits(model), s.logits()[..., :280])


@check("untied embeddings")
def _untied(s: Subject) -> None:
    model, folder = s.new(tie_word_embeddings=False).eval(), s.new_folder()
    model.save_pretrained(folder)
    again = s.load(folder=folder)
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight
    same(s.logits(again), s.logits(model))


@check("tokens added to model and tokenizer")
def _added(s: Subject) -> None:
    from megassm.hf import MegaSSMTokenizer

    tokenizer, model = MegaSSMTokenizer(), s.load()
    tokenizer.add_tokens([f"<tool {i}>" for i in range(50)])
    model.resize_token_embeddings(len(tokenizer))
    ids = tokenizer("a<tool 49>", return_tensors="pt")["input_ids"]
    same(ids.tolist(), [[97, 306]])
    assert torch.isfinite(s.logits(model, ids)).all()


@check("gradients of every parameter")
def _gradients(s: Subject) -> None:
    model = s.load().train()
    model(s.ids, labels=s.ids).loss.backward()
    without = [name for name, value in model.named_parameters() if value.grad is None]
    same(without, [])


def _gradient(model: Any, ids: Tensor) -> Tensor:
    model.train()(ids, labels=ids).loss.backward()
    found: Tensor = model.get_input_embeddings().weight.grad
    return found


@check("gradient checkpointing, both kinds")
def _checkpointing(s: Subject) -> None:
    for reentrant in (True, False):
        model = s.load()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        near(_gradient(model, s.ids), _gradient(s.load(), s.ids))


@check("training that learns a text")
def _learns(s: Subject) -> None:
    model = s.load().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(s.ids, labels=s.ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses


@check("frozen but for the embedding")
def _frozen(s: Subject) -> None:
    model = s.load().train().requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    assert float(_gradient(model, s.ids).norm()) > 0
