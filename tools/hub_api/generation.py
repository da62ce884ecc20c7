"""Ways to generate, and caches."""

from __future__ import annotations

import copy
import io
import itertools
import threading
import time
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor

from tools.hub_api.subject import END, Subject, check, near, same


def cache_of(output: Any) -> Any:
    return output.cache if "cache" in output else output.past_key_values


@check("greedy, twice the same")
def _greedy(s: Subject) -> None:
    same(s.greedy(), s.greedy())
    same(s.greedy().shape, torch.Size((2, 38)))


@check("greedy without a cache")
def _without_cache(s: Subject) -> None:
    same(s.greedy(use_cache=False), s.greedy())


@check("greedy is the most likely token of a forward pass")
def _is_argmax(s: Subject) -> None:
    text = s.greedy()
    same(s.logits(ids=text)[:, 29:-1].argmax(-1), text[:, 30:])


@check("sampling, by a seed")
def _sampling(s: Subject) -> None:
    def drawn(seed: int, **options: Any) -> Any:
        torch.manual_seed(seed)
        return s.greedy(do_sample=True, **options)

    same(drawn(0), drawn(0))
    same(drawn(0), drawn(0, use_cache=False))
    assert not torch.equal(drawn(0), drawn(1))


@check("temperature, top-k, top-p, min-p, typical-p")
def _samplers(s: Subject) -> None:
    settings: list[dict[str, Any]] = [
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"typical_p": 0.8},
    ]
    for options in settings:
        s.greedy(do_sample=True, **options)
    same(s.greedy(do_sample=True, top_k=1), s.greedy())


@check("epsilon and eta cut-off")
def _cutoffs(s: Subject) -> None:
    s.greedy(do_sample=True, epsilon_cutoff=3e-4, eta_cutoff=3e-4)


@check("beam search")
def _beams(s: Subject) -> None:
    same(s.greedy(num_beams=3), s.greedy(num_beams=3, use_cache=False))


@check("beams with scores, several returned")
def _beam_scores(s: Subject) -> None:
    found = s.greedy(num_beams=4, num_return_sequences=3, return_dict_in_generate=True, output_scores=True)
    same(found.sequences.shape, torch.Size((6, 38)))
    assert (found.sequences_scores.view(2, 3).diff(dim=1) <= 0).all()


@check("beam sampling, length penalty, early stopping")
def _beam_sampling(s: Subject) -> None:
    s.greedy(num_beams=2, do_sample=True)
    s.greedy(num_beams=2, length_penalty=2.0, early_stopping=True)


@check("several samples of a prompt")
def _several(s: Subject) -> None:
    same(s.greedy(do_sample=True, num_return_sequences=3).shape, torch.Size((6, 38)))


@check("repetition penalty, no repeated n-grams")
def _repetition(s: Subject) -> None:
    text = s.greedy(ids=s.ids[:, :1], tokens=30, no_repeat_ngram_size=2, repetition_penalty=1.2)[0].tolist()
    pairs = list(itertools.pairwise(text))
    same(len(pairs), len(set(pairs)))


@check("suppressed and bad words")
def _suppressed(s: Subject) -> None:
    first = int(s.greedy(tokens=1)[0, -1])
    assert int(s.greedy(tokens=1, suppress_tokens=[first])[0, -1]) != first
    assert int(s.greedy(tokens=1, bad_words_ids=[[first]])[0, -1]) != first


@check("sequence bias")
def _bias(s: Subject) -> None:
    same(s.greedy(tokens=1, sequence_bias=[[[7], 100.0]])[:, -1].tolist(), [7, 7])


@check("a list of end tokens")
def _ends(s: Subject) -> None:
    whole = s.greedy(s.model, s.ids[:1])
    second = int(whole[0, 31])
    cut = s.greedy(s.model, s.ids[:1], eos_token_id=[second, END])
    same(cut[0, -1], whole[0, 30:][whole[0, 30:] == second][0])
    assert cut.shape[1] <= 32


@check("least and most length")
def _lengths(s: Subject) -> None:
    first = int(s.greedy(tokens=1)[0, -1])
    longer = s.greedy(s.model, s.ids[:1], eos_token_id=first, min_new_tokens=4)
    assert longer.shape[1] >= 34
    same(s.model.generate(s.ids, max_length=38, do_sample=False), s.greedy())


@check("stop strings")
def _stop_strings(s: Subject) -> None:
    text = s.greedy(s.model, s.ids[:1], tokens=12, suppress_tokens=list(range(128, 300)))
    wanted = s.tokenizer.decode(text[0, 32:33])
    stopped = s.greedy(
        s.model, s.ids[:1], 12, stop_strings=[wanted], tokenizer=s.tokenizer, suppress_tokens=list(range(128, 300))
    )
    assert s.tokenizer.decode(stopped[0, 30:]).endswith(wanted)


@check("a stopping criterion of one's own")
def _criterion(s: Subject) -> None:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class AtLength(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 33)

    same(s.greedy(stopping_criteria=StoppingCriteriaList([AtLength()])).shape[1], 33)


@check("a logits processor of one's own")
def _processor(s: Subject) -> None:
    from transformers import LogitsProcessor, LogitsProcessorList

    class Always(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([9]), 0.0)

    assert (s.greedy(logits_processor=LogitsProcessorList([Always()]))[:, 30:] == 9).all()


@check("allowed tokens by prefix")
def _allowed(s: Subject) -> None:
    text = s.greedy(prefix_allowed_tokens_fn=lambda row, ids: [3 + row])
    same(text[:, 30:].float().mean(1).tolist(), [3.0, 4.0])


@check("forced end, decaying length")
def _forced(s: Subject) -> None:
    same(s.greedy(forced_eos_token_id=END)[:, -1].tolist(), [END, END])
    s.greedy(eos_token_id=END, exponential_decay_length_penalty=(2, 1.1))


@check("watermark")
def _watermark(s: Subject) -> None:
    from transformers import WatermarkingConfig

    s.greedy(watermarking_config=WatermarkingConfig(bias=2.5, seeding_scheme="lefthash"))


@check("classifier-free guidance")
def _guidance(s: Subject) -> None:
    assert s.greedy(guidance_scale=1.5, negative_prompt_ids=s.ids.flip(0)).shape == (2, 38)


@check("scores, logits, transition scores")
def _scores(s: Subject) -> None:
    found = s.greedy(return_dict_in_generate=True, output_scores=True, output_logits=True)
    near(found.logits[0], s.logits()[:, -1])
    chances = s.model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    expected = s.logits(ids=found.sequences)[:, 29:-1].log_softmax(-1).gather(2, found.sequences[:, 30:, None])
    near(chances, expected[..., 0])


@check("hidden states of what is generated")
def _hidden(s: Subject) -> None:
    found = s.greedy(return_dict_in_generate=True, output_hidden_states=True)
    same((len(found.hidden_states), len(found.hidden_states[0])), (8, 5))
    same(found.hidden_states[1][-1].shape, torch.Size((2, 1, 64)))


@check("attention weights of what is generated")
def _attentions(s: Subject) -> None:
    model = s.load(attn_implementation="eager")
    found = s.greedy(model, return_dict_in_generate=True, output_attentions=True)
    assert found.attentions[0], "no layer has any"
    same(found.attentions[0][0].shape[:2], torch.Size((2, 4)))


@check("assisted by a smaller model")
def _assisted(s: Subject) -> None:
    small = s.load() if s.kind == "Llama" else s.load(k=2)
    same(s.greedy(ids=s.ids[:1], tokens=20, assistant_model=small), s.greedy(ids=s.ids[:1], tokens=20))


@check("assisted by the prompt")
def _lookup(s: Subject) -> None:
    same(s.greedy(ids=s.ids[:1], tokens=20, prompt_lookup_num_tokens=3), s.greedy(ids=s.ids[:1], tokens=20))


@check("streamed to the terminal")
def _streamed(s: Subject) -> None:
    from transformers import TextStreamer

    prompt = s.tokenizer("The ", return_tensors="pt")
    with redirect_stdout(io.StringIO()) as printed:
        whole = s.model.generate(**prompt, streamer=TextStreamer(s.tokenizer), max_new_tokens=8, do_sample=False)
    same(printed.getvalue().rstrip("\n"), s.tokenizer.decode(whole[0]).rstrip("\n"))


@check("streamed from a thread")
def _iterated(s: Subject) -> None:
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(s.tokenizer, skip_prompt=True, timeout=60)
    options = {"streamer": streamer, "max_new_tokens": 8, "do_sample": False}
    thread = threading.Thread(target=s.model.generate, args=(s.ids[:1],), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    same(text, s.tokenizer.decode(s.greedy(ids=s.ids[:1])[0, 30:]))


@check("generated from embeddings")
def _from_embeddings(s: Subject) -> None:
    given = {"inputs_embeds": s.model.get_input_embeddings()(s.ids), "max_new_tokens": 8, "do_sample": False}
    same(s.model.generate(**given), s.greedy()[:, 30:])
    same(s.model.generate(s.ids, **given), s.greedy())


@check("generated from nothing")
def _from_nothing(s: Subject) -> None:
    special = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": END}
    same(s.model.generate(max_new_tokens=4, do_sample=False, **special)[0, 0], torch.tensor(END))


@check("a batch of texts padded on the left")
def _left_batch(s: Subject) -> None:
    batch = s.padded("left")
    together = s.model.generate(**batch, max_new_tokens=8, do_sample=False)[:, -8:]
    for row, size in enumerate(batch["attention_mask"].sum(1).tolist()):
        same(s.greedy(ids=batch["input_ids"][row : row + 1, -size:])[0, size:], together[row])


@check("a generation configuration of its own, saved")
def _configuration(s: Subject) -> None:
    model, folder = s.load(), s.new_folder()
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(folder)
    same(s.load(folder=folder).generate(s.ids).shape, torch.Size((2, 35)))


@check("stopped by time")
def _time(s: Subject) -> None:
    started = time.perf_counter()
    s.greedy(tokens=100_000, max_time=0.2)
    assert time.perf_counter() - started < 10


@check("a conversation continued from its cache")
def _continued(s: Subject) -> None:
    first = s.greedy(return_dict_in_generate=True)
    longer = torch.cat((first.sequences, s.ids[:, :5]), dim=1)
    same(s.greedy(ids=longer, past_key_values=cache_of(first)), s.greedy(ids=longer))


@check("a prompt's cache copied for two continuations")
def _copied(s: Subject) -> None:
    with torch.no_grad():
        prefix = cache_of(s.model(s.ids[:, :20], use_cache=True))
    for tail in (s.ids[:, 20:25], s.ids[:, 25:30]):
        text = torch.cat((s.ids[:, :20], tail), dim=1)
        same(s.greedy(ids=text, past_key_values=copy.deepcopy(prefix)), s.greedy(ids=text))


@check("a cache given back, of any batch")
def _reordered(s: Subject) -> None:
    with torch.no_grad():
        cache = cache_of(s.model(s.ids[:, :-1], use_cache=True))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
        cache.batch_select_indices(torch.tensor([0, 1, 3]))
        rows = s.ids[[1, 0, 1]]
        near(s.logits(ids=rows[:, -1:], past_key_values=cache)[:, 0], s.logits(ids=rows)[:, -1])


@check("a prompt read in parts")
def _chunked(s: Subject) -> None:
    same(s.greedy(prefill_chunk_size=7), s.greedy())


def _of_kind(s: Subject, kind: str) -> None:
    same(s.greedy(cache_implementation=kind), s.greedy())


@check("static cache")
def _static(s: Subject) -> None:
    _of_kind(s, "static")


@check("offloaded cache")
def _offloaded(s: Subject) -> None:
    _of_kind(s, "offloaded")


@check("quantised cache")
def _quantised(s: Subject) -> None:
    s.greedy(cache_implementation="quantized", cache_config={"backend": "quanto", "nbits": 4})


@check("transformers' own cache object")
def _dynamic(s: Subject) -> None:
    from transformers import DynamicCache

    same(s.greedy(past_key_values=DynamicCache(config=s.model.config)), s.greedy())


@check("generated under inference_mode, on a thread each")
def _threads(s: Subject) -> None:
    found: dict[int, Tensor] = {}

    def one(row: int) -> None:
        with torch.inference_mode():
            found[row] = s.greedy(ids=s.ids[row : row + 1])

    threads = [threading.Thread(target=one, args=(row,)) for row in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same(torch.cat((found[0], found[1])), s.greedy())
