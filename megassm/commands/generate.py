"""Continues a prompt with a trained model, at one or several budgets K; each text is printed while it is drawn."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megassm.cli.arguments import Parser, add_beyond, add_ema, budget_list, print_line, tool_parser, write_json
from megassm.cli.mixtures import layers_text, mixture_of_layers
from megassm.errors import visible

if TYPE_CHECKING:
    from megassm.eval.drafting import Drafting


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/generate.py runs/tiny --prompt 'def main(' --budgets 4,32")
    what = "run directory, one of its checkpoints/step-*, or an exported model; or the URL of one"
    result.add_argument("run", metavar="RUN_DIR", help=what)
    add_ema(result)
    result.add_argument("--prompt", required=True, metavar="TEXT")
    result.add_argument("--budgets", type=budget_list, metavar="LIST", help="K to sample at (default: K_max)")
    result.add_argument(
        "--mix", type=mixture_of_layers, nargs="+", default=[], metavar="K/K/..", help="one K a layer to sample at"
    )
    result.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens to draw (default: 64)")
    result.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    result.add_argument("--top-k", type=int, metavar="N", help="draw among the N likeliest tokens")
    result.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest tokens of probability P")
    what = "draft at this smaller budget, and keep what the full one accepts: the same texts, sooner"
    what += "; auto: chosen while the text grows, as is the number of drafts"
    result.add_argument("--draft-k", type=draft_budget, metavar="K|auto", help=what)
    what = "drafts a round (default: 4); of auto the most there may be (default: 8)"
    result.add_argument("--draft-tokens", type=int, metavar="N", help=what)
    add_beyond(result)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return result


def draft_budget(text: str) -> int | str:
    """The value of --draft-k; for argparse's `type`."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a budget; give a number such as 4, or auto") from None


def most(budgets: Sequence[int] | None) -> int | None:
    """The budget that a model is opened at; None: whole."""
    return max(budgets) if budgets else None


def main() -> None:
    command_line = parser()
    arguments = command_line.parse_args()
    if arguments.draft_tokens is not None and arguments.draft_k is None:
        command_line.error("--draft-tokens goes with --draft-k; give both, or neither")
    from megassm.eval.generate import TextStream, draft_text, sample_text
    from megassm.eval.sampling import Sampling
    from megassm.eval.session import open_for_text

    opened_at = most([*(arguments.budgets or []), *(each for layers in arguments.mix for each in layers)])
    model, tokenizer, title = open_for_text(arguments.run, None, arguments.device, arguments.ema, opened_at)
    if arguments.beyond:
        model.read_beyond(arguments.beyond)
    sampling = Sampling(arguments.tokens, arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    rows = []
    print_line(title)
    budgets = [*(arguments.budgets or []), *arguments.mix] or [model.config.num_channels]
    for k in budgets:
        shown_k = k if isinstance(k, int) else layers_text(k)
        print_line(f"\n--- K = {shown_k}")
        show(arguments.prompt)
        stream = TextStream(tokenizer, show)
        told: dict[str, float | None] = {}
        if arguments.draft_k is None:
            text = sample_text(model, tokenizer, arguments.prompt, k, sampling._replace(ended=stream))
        else:
            drafting = drafts(arguments.draft_k, arguments.draft_tokens)
            text, found = draft_text(model, tokenizer, arguments.prompt, k, sampling._replace(ended=stream), drafting)
            told = {"acceptance": found.acceptance, "speed_up": found.speed_up}
        stream.finish(text)
        print_line("")
        if told:
            print_line("drafts: " + ", ".join(f"{name} {'-' if value is None else f'{value:.2f}'}"
                                              for name, value in told.items()))  # fmt: skip
        rows.append({"k": shown_k, "text": arguments.prompt + text, **told})
    write_json(rows, arguments.json)


def drafts(k: int | str, tokens: int | None) -> Drafting:
    """What --draft-k and --draft-tokens ask for."""
    from megassm.eval.drafting import Drafting

    drafting = Drafting.auto() if k == "auto" else Drafting(int(k))
    return drafting if tokens is None else drafting._replace(tokens=tokens)


def show(text: str) -> None:
    """Prints a part of a text at once."""
    print(visible(text), end="", flush=True)
