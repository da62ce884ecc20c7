"""Writes docs/configuration.md, the reference of every knob, from the schema."""

from __future__ import annotations

from pathlib import Path

from megassm.cli.arguments import Parser, output_file, run_tool

PAGE = Path(__file__).parents[1] / "docs/configuration.md"


def main() -> None:
    parser = Parser(__doc__ or "", "python tools/config_reference.py")
    parser.add_argument("--output", type=output_file, default=PAGE, metavar="FILE", help="(default: %(default)s)")
    arguments = parser.parse_args()
    from megassm.config.reference import reference

    arguments.output.write_text(reference(), encoding="utf-8")
    print(arguments.output)


if __name__ == "__main__":
    run_tool(main)
