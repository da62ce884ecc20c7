"""Continues a prompt with a trained model, at one or several budgets K; each text is printed while it is drawn."""

from __future__ import annotations

from collections.abc import Sequence

from megassm.cli.arguments import Parser, add_ema, budget_list, print_line, tool_parser, write_json
from megassm.errors import visible


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/generate.py runs/tiny --prompt 'def main(' --budgets 4,32")
    what = "run directory, one of its checkpoints/step-*, or an exported model; or the URL of one"
    result.add_argument("run", metavar="RUN_DIR", help=what)
    add_ema(result)
    result.add_argument("--prompt", required=True, metavar="TEXT")
    result.add_argument("--budgets", type=budget_list, metavar="LIST", help="K to sample at (default: K_max)")
    result.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens to draw (default: 64)")
    result.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    result.add_argument("--top-k", type=int, metavar="N", help="draw among the N likeliest tokens")
    result.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest tokens of probability P")
    what = "draft at this smaller budget, and keep what the full one accepts: the same texts, sooner"
    result.add_argument("--draft-k", type=int, metavar="K", help=what)
    result.add_argument("--draft-tokens", type=int, default=4, metavar="N", help="drafts a round (default: 4)")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return result


def most(budgets: Sequence[int] | None) -> int | None:
    """The budget that a model is opened at; None: whole."""
    return max(budgets) if budgets else None


def main() -> None:
    arguments = parser().parse_args()
    from megassm.eval.generate import TextStream, sample_text
    from megassm.eval.sampling import Sampling
    from megassm.eval.session import open_for_text
    from megassm.eval.speculate import Drafting

    k = most(arguments.budgets)
    model, tokenizer, title = open_for_text(arguments.run, None, arguments.device, arguments.ema, k)
    sampling = Sampling(arguments.tokens, arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    drafting = None if arguments.draft_k is None else Drafting(arguments.draft_k, arguments.draft_tokens)
    rows = []
    print_line(title)
    for k in arguments.budgets or [model.config.num_channels]:
        print_line(f"\n--- K = {k}")
        show(arguments.prompt)
        stream = TextStream(tokenizer, show)
        text = sample_text(model, tokenizer, arguments.prompt, k, sampling._replace(ended=stream), drafting)
        stream.finish(text)
        print_line("")
        rows.append({"k": k, "text": arguments.prompt + text})
    write_json(rows, arguments.json)


def show(text: str) -> None:
    """Prints a part of a text at once."""
    print(visible(text), end="", flush=True)
