"""The lm_eval model against sums made by hand; the local tasks, at several budgets, against its own answers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megassm.data.tokenizer.base import PROBE, Tokenizer, load_tokenizer, train_sentencepiece
from megassm.errors import UserError
from megassm.eval.generate import generate
from megassm.eval.sampling import Sampling
from megassm.eval.session import OpenModel
from megassm.model import LanguageModel, build_model, losses_at
from tests.conftest import ROOT, run_python
from tests.test_model import config

pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

LENGTH = 24
PAIRS = [("the cat", " sat"), ("a", "b c d e"), ("", "no context"), ("ends with spaces  ", "x"), ("x" * 60, " long"),
         ("caf\u00e9 \u4e16", "\u754c")]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build_model(config(vocab_size=300, seq_len=LENGTH, embed_init_std=0.3), 0).eval()


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(["the cat sat on a mat and sat there"] * 50 + [PROBE], 290))
    return load_tokenizer(path)


@pytest.fixture(params=["bytes", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, sentencepiece: Tokenizer) -> Tokenizer:
    return load_tokenizer("bytes") if request.param == "bytes" else sentencepiece


def harness(model: LanguageModel, tokenizer: Tokenizer, **options: Any) -> Any:
    from megassm.eval.harness import MegaSSMLM

    return MegaSSMLM(OpenModel(model, tokenizer, "test"), **options)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=own) for own in arguments]


def by_hand(model: LanguageModel, context: list[int], ids: list[int], k: int) -> tuple[float, bool]:
    """One token at a time, each from the tokens before it that fit."""
    total, greedy = 0.0, True
    text = (context + ids)[-(LENGTH + 1) :]
    for place in range(len(text) - len(ids), len(text)):
        with torch.no_grad():
            log_p = model(torch.tensor([text[:place]]), k)[0, -1].log_softmax(-1)
        total += float(log_p[text[place]])
        greedy &= int(log_p.argmax()) == text[place]
    return total, greedy


@pytest.mark.parametrize("k", [1, 6])
def test_loglikelihood_in_any_batch(model: LanguageModel, tokenizer: Tokenizer, k: int) -> None:
    found = {size: harness(model, tokenizer, k=k, batch_size=size).loglikelihood(requests(*PAIRS)) for size in (1, 4)}
    for one, four, (context, continuation) in zip(found[1], found[4], PAIRS, strict=True):
        text = tokenizer.encode([context + continuation])[0].tolist()
        count = len(tokenizer.encode([continuation])[0])
        if context.endswith(" "):  # lm_eval scores a context's last spaces with the continuation
            count = len(text) - len(tokenizer.encode([context.rstrip()])[0])
        before = text[:-count] or [tokenizer.eod]
        expected = by_hand(model, before, text[-count:], k)
        for answer in (one, four):
            assert answer[0] == pytest.approx(expected[0], abs=1e-4)
            assert answer[1] == expected[1]


def test_greedy_continuations_are_told(model: LanguageModel) -> None:
    own = harness(model, load_tokenizer("bytes"), k=3)
    (likeliest,) = generate(model, [list(b"the cat")], 3, Sampling(4, 0.0))
    found = own._loglikelihood_tokens([(None, list(b"the cat"), likeliest), (None, list(b"the cat"), [0, 1])])
    assert [greedy for _, greedy in found] == [True, False]


def test_tokens_across_the_boundary_are_scored(model: LanguageModel, sentencepiece: Tokenizer) -> None:
    own = harness(model, sentencepiece)
    (the,) = sentencepiece.encode(["the"])[0].tolist()
    assert the not in sentencepiece.encode(["th"])[0]
    assert own._encode_pair("th", "e") == ([sentencepiece.eod], [the])
    sat = sentencepiece.encode(["sat "])[0].tolist()
    assert own._encode_pair("sat th", "e") == (sat, [the])


def test_rolling_loglikelihood_counts_every_token_once(model: LanguageModel, tokenizer: Tokenizer) -> None:
    texts = ["sat", "the cat sat on a mat and sat there, " * 4, ""]
    found = harness(model, tokenizer, k=4).loglikelihood_rolling(requests(*((text,) for text in texts)))
    short = tokenizer.encode([texts[0]])[0].tolist()
    assert found[0] == pytest.approx(by_hand(model, [tokenizer.eod], short, 4)[0], abs=1e-4)
    ids = [tokenizer.eod, *tokenizer.encode([texts[1]])[0].tolist()]
    total = 0.0
    for start in range(0, len(ids) - 1, LENGTH):  # windows of the trained length; the last looks back as far as it can
        stop = min(start + LENGTH, len(ids) - 1)
        first = max(0, stop - LENGTH)
        with torch.no_grad():
            nll = losses_at(model, torch.tensor([ids[first : stop + 1]]), 4)[0]
        total -= float(nll[start - first :].sum())
    assert found[1] == pytest.approx(total, abs=1e-3)
    assert found[2] == 0.0


def test_max_length(model: LanguageModel) -> None:
    tokenizer = load_tokenizer("bytes")
    pair = requests(("x" * 60, "y"))
    trained, longer = harness(model, tokenizer, k=2), harness(model, tokenizer, k=2, max_length=61)
    assert trained.loglikelihood(pair) != longer.loglikelihood(pair)
    with torch.no_grad():
        logits = model(torch.full((1, 60), ord("x")), 2)
    assert longer.loglikelihood(pair)[0][0] == pytest.approx(float(logits[0, -1].log_softmax(-1)[ord("y")]), abs=1e-4)
    (answer,) = trained.loglikelihood(requests(("x", "y" * 40)))
    expected = 0.0  # pieces of 12, each after as much as fits
    for stop in (12, 24, 36, 40):
        size = 4 if stop == 40 else 12
        text = (b"x" + b"y" * stop)[-LENGTH - 1 :]
        expected += by_hand(model, list(text[:-size]), list(text[-size:]), 2)[0]
    assert answer[0] == pytest.approx(expected, abs=1e-4)


def test_generate_until(model: LanguageModel) -> None:
    tokenizer = load_tokenizer("bytes")
    own = harness(model, tokenizer, k=3, batch_size=2, max_gen_toks=12)
    contexts = ["the cat", "a", "ends here.", "x" * 60, ""]

    def plain(context: str, tokens: int) -> str:
        ids = (list(context.encode()) or [256])[-(LENGTH - tokens) :]
        (drawn,) = generate(model, [ids], 3, Sampling(tokens, 0.0, stop_ids=[256]))
        return tokenizer.decode([i for i in drawn if i < 257])

    whole = own.generate_until(requests(*((context, {"until": []}) for context in contexts)))
    assert whole == [plain(context, 12) for context in contexts]
    stop = next(text[i : i + 2] for text in whole for i in range(2, 9) if text[i : i + 2].isascii())
    assert any(stop in text for text in whole)
    cut = own.generate_until(requests(*((context, {"until": [stop, "never"]}) for context in contexts)))
    assert cut == [text.split(stop)[0] for text in whole]
    mixed = requests(("a", {"until": stop, "max_gen_toks": 3}), ("the cat", {"until": []}))
    assert own.generate_until(mixed) == [plain("a", 3).split(stop)[0], whole[0]]


def test_what_a_task_wants_drawn() -> None:
    from megassm.eval.harness import Drawing

    assert Drawing.of({"until": "\n", "do_sample": False, "temperature": 0.7}, 9) == (["\n"], 9, 0.0, None, None)
    wanted = {"until": ["a", ""], "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "max_gen_toks": 3}
    assert Drawing.of(wanted, 9) == (["a"], 3, 0.7, 5, 0.9)


EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "lambada_test": [{"query": "the cat sat on the", "choices": ["mat"]}, {"query": "and", "choices": ["there"]}],
    "hellaswag_val": [{"query": "A man", "choices": ["sits.", "runs far.", "is"], "gold": 1}] * 2,
    "piqa_val": [
        {"goal": "open", "sol1": "pull", "sol2": "push it", "gold": 0},
        {"goal": "close", "sol1": "push", "sol2": "no", "gold": 1},
    ],
    "arc_easy_test": [{"query": "Question: why?\nAnswer:", "choices": ["so", "not", "because", "of"], "gold": 3}] * 3,
}


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, rows in EXAMPLES.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("MEGASSM_EVAL_DATA", str(tmp_path))
    return tmp_path


def test_tasks_over_budgets(model: LanguageModel, examples: Path) -> None:
    from megassm.eval.harness import evaluate_tasks, local_tasks

    own = harness(model, load_tokenizer("bytes"), max_length=60)
    rows = evaluate_tasks(own, local_tasks(), [2, 6], limit=None)
    value = {(row["task"], row["metric"], row["k"]): row["value"] for row in rows}
    assert len(value) == len(rows) == 2 * 2 * 4

    def log_p(context: str, continuation: str) -> float:
        answer: float = own.loglikelihood(requests((context, continuation)))[0][0]
        return answer

    def accuracy(name: str, prompt: Callable[[dict[str, Any]], tuple[str, list[str]]], per_character: bool) -> float:
        right = []
        for row in EXAMPLES[name]:
            text, choices = prompt(row)
            scores = [log_p(text, f" {choice}") / (len(choice) if per_character else 1) for choice in choices]
            right.append(scores.index(max(scores)) == row["gold"])
        return sum(right) / len(right)

    for k in (2, 6):
        own.k = k
        last_words = [log_p(row["query"], f" {row['choices'][0]}") for row in EXAMPLES["lambada_test"]]
        assert value["lambada", "perplexity", k] == pytest.approx(math.exp(-sum(last_words) / 2), rel=1e-4)
        for metric, per_character in (("acc", False), ("acc_norm", True)):
            for task, name in (("hellaswag", "hellaswag_val"), ("arc_easy", "arc_easy_test")):
                expected = accuracy(name, lambda row: (row["query"], row["choices"]), per_character)
                assert value[task, metric, k] == expected
            piqa = accuracy(
                "piqa_val",
                lambda row: (f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]]),
                per_character,
            )
            assert value["piqa", metric, k] == piqa
    assert value["lambada", "perplexity", 2] != value["lambada", "perplexity", 6]
    assert {row["examples"] for row in evaluate_tasks(own, ["arc_easy"], [2], limit=2)} == {2}


def test_refused_tasks(model: LanguageModel, examples: Path) -> None:
    from megassm.eval.harness import evaluate_tasks

    own = harness(model, load_tokenizer("bytes"))
    with pytest.raises(UserError, match="tasks mmlu: must be among arc_easy, hellaswag, lambada, piqa"):
        evaluate_tasks(own, ["mmlu", "piqa"], [2], None)
    with pytest.raises(UserError, match="K = 9"):
        evaluate_tasks(own, ["piqa"], [9], None)
    (examples / "piqa_val.jsonl").unlink()
    with pytest.raises(UserError, match=r"piqa_val\.jsonl\.gz: no such file"):
        evaluate_tasks(own, ["piqa"], [2], None)


HUB = {
    "piqa": {"goal": "Cut bread", "sol1": "knife", "sol2": "spoon", "label": 0},
    "lambada": {"text": "the cat sat on the mat"},
    "arc_easy": {"question": "Who?", "choices": {"text": ["I", "you"], "label": ["A", "B"]}, "answerKey": "B"},
    "hellaswag": {"activity_label": "Baking", "ctx_a": "A man.", "ctx_b": "he", "endings": ["a [x]", "b", "c", "d"],
                  "label": "1"},
}  # fmt: skip
ASKED = {
    "piqa": {"goal": "Cut bread", "sol1": "knife", "sol2": "spoon", "gold": 0},
    "lambada": {"query": "the cat sat on the", "choices": ["mat"]},
    "arc_easy": {"query": "Question: Who?\nAnswer:", "choices": ["I", "you"], "gold": 1},
    "hellaswag": {"query": "Baking: A man. He", "choices": ["a ", "b", "c", "d"], "gold": 1},
}


def test_the_hubs_fields(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megassm.eval.harness import evaluate_tasks
    from megassm.eval.task_fields import as_asked

    names = {"piqa": "piqa_val", "lambada": "lambada_test", "arc_easy": "arc_easy_test", "hellaswag": "hellaswag_val"}
    results = []
    for form in (HUB, ASKED):
        for task, example in form.items():
            assert as_asked(task, example, "here") == ASKED[task]
            (tmp_path / f"{names[task]}.jsonl").write_text(json.dumps(example) + "\n")
        monkeypatch.setenv("MEGASSM_EVAL_DATA", str(tmp_path))
        lm = harness(model, load_tokenizer("bytes"))
        results.append([row["value"] for row in evaluate_tasks(lm, list(names), [6], None)])
    assert results[0] == results[1]
    (tmp_path / "piqa_val.jsonl").write_text('{"goal": "x", "sol1": "y"}\n')
    with pytest.raises(
        UserError, match=r"piqa_val.jsonl:1: has the fields goal sol1; piqa wants .*sol2 gold, or .*label"
    ):
        evaluate_tasks(lm, ["piqa"], [6], None)
    for task, change in (("piqa", {"label": -1}), ("arc_easy", {"answerKey": "C"}), ("lambada", {"text": "one"}),
                         ("hellaswag", {"label": ""})):  # fmt: skip
        with pytest.raises(UserError, match=f"here: not an example of {task} "):
            as_asked(task, {**HUB[task], **change}, "here")


def test_the_command_and_the_registered_name_agree(trained: Path, examples: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from megassm.eval.harness import TASKS

    options = ("--tasks", "lambada,piqa", "--budgets", "2,8", "--limit", "2", "--json", str(tmp_path / "table.json"))
    run_python("tools/evaluate_tasks.py", str(trained), "--data", str(examples), *options)
    rows = json.loads((tmp_path / "table.json").read_text())
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    done = simple_evaluate("megassm", f"checkpoint={trained},k=8", tasks=["lambada"], task_manager=manager, limit=2)
    assert done is not None
    (row,) = [row for row in rows if (row["task"], row["metric"], row["k"]) == ("lambada", "perplexity", 8)]
    assert row["value"] == pytest.approx(done["results"]["lambada"]["perplexity,none"], rel=1e-4)
    assert run_python("tools/evaluate_tasks.py", str(trained), check=False).returncode == 2


def test_the_published_files(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.environ.get("MEGASSM_EVAL_DATA", ROOT.parent / "shared/data/eval"))
    if not (folder / "lambada_test.jsonl.gz").exists():
        pytest.skip("the evaluation sets are not here; MEGASSM_EVAL_DATA names their folder")
    from megassm.eval.harness import evaluate_tasks, local_tasks

    monkeypatch.setenv("MEGASSM_EVAL_DATA", str(folder))
    rows = evaluate_tasks(harness(model, load_tokenizer("bytes"), max_length=700), local_tasks(), [1, 4], limit=3)
    assert len(rows) == 16
    assert all(row["examples"] == 3 and math.isfinite(row["value"]) for row in rows)
