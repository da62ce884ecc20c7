"""A model at a budget K for the EleutherAI harness (lm_eval), and tasks that read local files.

Importing this module registers the model: `simple_evaluate("megassm", "checkpoint=runs/demo,k=4", tasks=[...])`.
Written against lm_eval 0.4.13. Shapes: B batch, L length, N positions, D width.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megassm.cli.arguments import TableRow
from megassm.errors import UserError
from megassm.eval.generate import generate
from megassm.eval.sampling import Sampling
from megassm.eval.session import OpenModel, open_for_text

TASKS = Path(__file__).parent / "tasks"
BOOTSTRAPS = 1000
"""Resamples for the standard errors that have no formula."""

Item = TypeVar("Item")


class Continuation(NamedTuple):
    """Ids to score, given ids before them."""

    context: list[int]
    ids: list[int]


@register_model("megassm")
class MegaSSMLM(TemplateLM):
    """Texts longer than `max_length` lose their beginning."""

    def __init__(
        self,
        checkpoint: str | Path | OpenModel,
        k: int | None = None,
        max_length: int | None = None,
        batch_size: int | str = 16,
        device: str | None = None,
        max_gen_toks: int = 256,
        **others: object,
    ) -> None:
        """Opens a run directory, a checkpoint or an exported model.

        Args:
            checkpoint: where, or what was opened already.
            k: the budget; None is K_max. It may be set again later.
            max_length: tokens of context and continuation; None is model.seq_len.
            batch_size: texts at a time.
            device: "cpu" or "cuda"; None is CUDA where torch finds it.
            max_gen_toks: tokens to draw where a task does not say.
            **others: what lm_eval passes to every model, such as max_batch_size; not needed.
        """
        super().__init__()
        name = "auto" if device is None else device.partition(":")[0]
        opened = checkpoint if isinstance(checkpoint, OpenModel) else open_for_text(Path(checkpoint), None, name)  # type: ignore[arg-type]
        self.model, self._own, _title = opened
        self.k = k or self.model.config.num_channels
        self.max_length = max_length or self.model.config.seq_len
        self.batch_size = 16 if batch_size == "auto" else int(batch_size)
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """Also what a text without context is scored after: documents follow it in training."""
        return self._own.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: object) -> list[int]:
        ids: list[int] = self._own.encode([string])[0].tolist()
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm_eval splits, but a token that spans the boundary is scored, not lost."""
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        whole = self.tok_encode(context + continuation)
        alone = self.tok_encode(context)
        shared = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(alone))
        shared = min(shared, len(whole) - 1)
        return (whole[:shared] or [self.eot_token_id]), whole[shared:]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **others: object
    ) -> list[tuple[float, bool]]:
        found = self._score([Continuation(context, ids) for _, context, ids in requests])
        for (key, _, _), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, nats: every token once, after as much of its text as fits, without overlap of windows."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length, 1)
            parts = [Continuation(*make_disjoint_window(window)) for window in windows]
            totals.append(math.fsum(nll for nll, _ in self._score(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Each context's continuation up to the first of its stop strings, which is left out."""
        answers = [""] * len(requests)

        def settings(i: int) -> str:
            return json.dumps(requests[i].args[1], sort_keys=True)

        contexts = [self.tok_encode(request.args[0]) or [self.eot_token_id] for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (settings(i), len(contexts[i])))
        for wanted, group in groupby(order, key=settings):
            options = Drawing.of(json.loads(wanted), self.max_gen_toks)
            room = max(1, self.max_length - options.max_tokens)
            for chunk in _chunks(list(group), self.batch_size):
                texts = self._draw([contexts[i][-room:] for i in chunk], options)
                for i, text in zip(chunk, texts, strict=True):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def _draw(self, prompts: list[list[int]], options: Drawing) -> list[str]:
        sampling = Sampling(
            options.max_tokens,
            options.temperature,
            options.top_k,
            options.top_p,
            stop_ids=(self.eot_token_id,),
            ended=lambda ids: any(stop in self._text(ids) for stop in options.stops),
        )
        texts = [self._text(ids) for ids in generate(self.model, prompts, self.k, sampling)]
        return [
            text[: min((text.find(stop) for stop in options.stops if stop in text), default=None)] for text in texts
        ]

    def _text(self, ids: Sequence[int]) -> str:
        return self._own.decode([i for i in ids if i < self._own.vocab_size])

    @torch.no_grad()
    def _score(self, wanted: Sequence[Continuation]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether every token was the likeliest) of each."""
        parts = [(i, part) for i, own in enumerate(wanted) for part in self._fitting(own)]
        parts.sort(key=lambda own: -len(own[1].context + own[1].ids))
        answers = [(0.0, True)] * len(wanted)
        for chunk in _chunks(parts, self.batch_size):
            found = self._score_batch([part for _, part in chunk])
            for (i, _), (log_p, greedy) in zip(chunk, found, strict=True):
                answers[i] = (answers[i][0] + log_p, answers[i][1] and greedy)
        return answers

    def _fitting(self, own: Continuation) -> list[Continuation]:
        """What is longer than `max_length` in pieces of half of it: each token once, after what fits before it."""
        if len(own.ids) <= self.max_length:
            return [own] if own.ids else []
        size = max(1, self.max_length // 2)
        starts = range(0, len(own.ids), size)
        return [Continuation(own.context + own.ids[:start], own.ids[start : start + size]) for start in starts]

    def _score_batch(self, wanted: Sequence[Continuation]) -> Iterator[tuple[float, bool]]:
        """One forward pass, padded on the right, which no earlier position sees; logits where they are asked for."""
        texts = [(context + ids)[-(self.max_length + 1) :] for context, ids in wanted]
        longest = max(map(len, texts)) - 1
        device = self.model.embedding_VD.device
        ids_BL = torch.tensor([text[:-1] + [0] * (longest - len(text) + 1) for text in texts], device=device)
        x_BLD = self.model.features(ids_BL, self.k)
        for x_LD, text, (_, ids) in zip(x_BLD, texts, wanted, strict=True):
            count = len(ids)
            targets_N = torch.tensor(ids, device=device)
            logits_NV = self.model.logits(x_LD[len(text) - 1 - count : len(text) - 1]).float()
            log_p_N = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])
            yield float(log_p_N.double().sum()), bool((logits_NV.argmax(-1) == targets_N).all())


class Drawing(NamedTuple):
    """What a task wants drawn."""

    stops: list[str]
    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None

    @staticmethod
    def of(options: Mapping[str, Any], max_gen_toks: int) -> Drawing:
        """From lm_eval's generation arguments, Hugging Face's names among them."""
        until = options.get("until") or []
        given = (options.get(name) for name in ("max_gen_toks", "max_new_tokens"))
        return Drawing(
            stops=[stop for stop in ([until] if isinstance(until, str) else until) if stop],
            max_tokens=next((int(count) for count in given if count), max_gen_toks),
            temperature=float(options.get("temperature") or 1.0) if options.get("do_sample") else 0.0,
            top_k=options.get("top_k") or None,
            top_p=options.get("top_p"),
        )


def local_tasks() -> list[str]:
    """The names of the tasks that need no hub."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def evaluate_tasks(model: MegaSSMLM, tasks: Sequence[str], budgets: Sequence[int], limit: int | None) -> list[TableRow]:
    """A row for each task, metric and budget: the value and its standard error.

    Args:
        model: opened once; its `k` is left at the last budget.
        tasks: names of local tasks; their files are in the folder that MEGASSM_EVAL_DATA names.
        budgets: K.
        limit: examples of each task; None is all.

    Raises:
        UserError: an unknown task, a missing file, a budget out of range.
    """
    unknown = [task for task in tasks if task not in local_tasks()]
    if unknown:
        raise UserError(f"tasks {', '.join(unknown)}: must be among {', '.join(local_tasks())}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    rows: list[TableRow] = []
    for k in budgets:
        model.k = k
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        with redirect_stdout(sys.stderr):  # it says what it does
            done = simple_evaluate(
                model,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
        assert done is not None
        for task in tasks:
            results, examples = done["results"][task], done["n-samples"][task]["effective"]
            for metric, value in _metrics(results):
                error = results[f"{metric}_stderr,none"]
                own = {"task": task, "metric": metric, "k": k}
                rows.append({**own, "value": value, "stderr": error, "examples": examples})
    order = {row["metric"]: i for i, row in enumerate(reversed(rows))}
    return sorted(rows, key=lambda row: (tasks.index(row["task"]), -order[row["metric"]]))


def _metrics(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in results.items():
        metric, comma, _ = name.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield metric, float(value)


def _chunks(items: list[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
