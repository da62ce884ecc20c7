"""Checks decoding at length: what the tests do small. Takes minutes; prints a row a check and fails where one does.

requests      texts that come and go, each with its own K: as alone, and memory as before
greedy        drafting at a small K gives the plain text, token for token, pure and hybrid
memory        a long text's state and the process stay as large as they were (pure spectral)
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from megassm.cli.arguments import Parser, TableRow, positive, print_table, run_tool, tool_parser

if TYPE_CHECKING:
    from megassm.model import LanguageModel

CHECKS = ("requests", "greedy", "memory")
BUDGETS = (2, 4, 8, 16, 32)
LOUDER = 2.0
"""Weights of blocks over those of a start: a text that does not repeat itself, of whose drafts some are refused."""


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/check_decoding.py --checks requests --requests 10000")
    result.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    result.add_argument("--requests", type=positive, default=10_000, metavar="N")
    result.add_argument("--greedy-tokens", type=positive, default=10_000, metavar="N", help="of each model")
    result.add_argument("--greedy-width", type=positive, default=448, metavar="D", help="448: 11M parameters")
    result.add_argument("--memory-tokens", type=positive, default=100_000, metavar="N")
    return result


def main() -> None:
    arguments = parser().parse_args()
    from megassm.errors import UserError

    checks: dict[str, Callable[[], list[TableRow]]] = {
        "requests": lambda: [check_requests(arguments.requests)],
        "greedy": lambda: [check_greedy(pattern, arguments.greedy_tokens, arguments.greedy_width)
                           for pattern in ("S", "SA")],
        "memory": lambda: [check_memory(arguments.memory_tokens)],
    }  # fmt: skip
    rows = [row for name in arguments.checks for row in checks[name]()]
    print_table("decoding", rows, arguments.json)
    wrong = [str(row["check"]) for row in rows if not row["holds"]]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: does not hold; report it with the table")


def check_requests(count: int) -> TableRow:
    """`count` greedy requests through the scheduler; every hundredth is compared with its text alone."""
    from megassm.eval.generate import generate
    from megassm.eval.sampling import Sampling
    from megassm.eval.scheduler import Request, Scheduler

    model, drawn, started = _model("SA", 64, 2048), random.Random(0), time.perf_counter()
    scheduler, wanted, differ, cancelled = Scheduler(model), {}, 0, 0
    early_mib = 0.0
    for place in range(count):
        length = round(300 ** drawn.random())
        prompt = [drawn.randrange(256) for _ in range(length)]
        request = Request(prompt, Sampling(drawn.randint(1, 12), temperature=0), drawn.choice(BUDGETS))
        number = scheduler.submit(request)
        if place % 100 == 0:
            wanted[number] = request
        elif place % 50 == 1:
            scheduler.cancel(number if place % 100 == 1 else number - 1)
            cancelled += 1
        while scheduler.is_busy and (place % 20 == 19 or place == count - 1):
            for news in scheduler.step():
                if news.text is not None and news.number in wanted:
                    request = wanted.pop(news.number)
                    alone = generate(model, [request.prompt], request.k, request.sampling)[0]
                    differ += alone != news.text
        if place == count // 5:
            early_mib = _process_mib()
    return {
        "check": "requests",
        "holds": differ == 0 and scheduler.state_bytes == 0 and _process_mib() - early_mib < 20,
        "tokens": count,
        "result": f"{differ} of {-(-count // 100)} differ, {cancelled} cancelled, "
        f"{scheduler.state_bytes} bytes of state left, {early_mib:.0f} -> {_process_mib():.0f} MiB",
        "s": time.perf_counter() - started,
    }


def check_greedy(pattern: str, tokens: int, width: int) -> TableRow:
    """One text of `tokens`, plain and drafted for."""
    from megassm.eval.drafting import Drafting
    from megassm.eval.generate import generate
    from megassm.eval.sampling import Sampling
    from megassm.eval.speculate import speculate

    model, started = _model(pattern, width, 16_384, LOUDER), time.perf_counter()
    sampling = Sampling(tokens, temperature=0)
    plain = generate(model, [[1, 2, 3]], 32, sampling)[0]
    found = speculate(model, [[1, 2, 3]], 32, sampling, Drafting(8, 4))
    same = next(
        (place for place, pair in enumerate(zip(plain, found.texts[0], strict=True)) if len({*pair}) > 1), tokens
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "check": f"greedy {pattern}",
        "holds": same == tokens and found.acceptance < 0.99,
        "tokens": tokens,
        "result": f"{parameters / 1e6:.1f}M parameters, {len({*plain})} ids, equal up to token {same}, "
        f"acceptance {found.acceptance:.2f}",
        "s": time.perf_counter() - started,
    }


def check_memory(tokens: int) -> TableRow:
    """`tokens` steps: the state's size, and the process's."""
    import torch

    model, started = _model("S", 64, 2048), time.perf_counter()
    logits, state = model.prefill(torch.tensor([[1]]), 8)
    early, size = 0.0, state.nbytes
    for place in range(tokens):
        logits, state = model.step(logits.argmax(-1), state, 8)
        if place == tokens // 10:
            early = _process_mib()
    return {
        "check": "memory",
        "holds": state.nbytes == size and _process_mib() - early < 10,
        "tokens": tokens,
        "result": f"state of {size:,} -> {state.nbytes:,} bytes, {early:.0f} -> {_process_mib():.0f} MiB",
        "s": time.perf_counter() - started,
    }


def _model(pattern: str, width: int, seq_len: int, gain: float = 1.0) -> LanguageModel:
    from megassm import ModelConfig, build_model

    config = ModelConfig(
        vocab_size=257, d_model=width, n_layers=2, n_heads=4, seq_len=seq_len, num_channels=32, d_ffn=2 * width,
        pattern=pattern, embed_init_std=0.5, tie_embeddings=gain == 1,
    )  # fmt: skip
    model = build_model(config, 0).eval().requires_grad_(False)
    for parameter in model.blocks.parameters():
        parameter.mul_(gain)
    return model


def _process_mib() -> float:
    """The most that the process ever held: flat once all kinds of texts have been."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    run_tool(main)
