"""`proximo plot`: curves of one or several runs."""

from __future__ import annotations

import argparse
from typing import Any


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "plot",
        help="draw returns, lengths and losses of runs",
        usage="proximo plot RUN [RUN …] [options]",
        description="Draw curves of runs. Runs that differ in nothing but their seed become one line, their mean, "
        "with a band of one standard deviation.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="PNG, SVG or PDF [curves.png, in the run folder where there is one run]",
    )
    parser.add_argument(
        "--metric", action="append", metavar="NAME", help="draw this metric alone; may be given several times"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Draw, and say where."""
    from proximo.report.plot import plot

    print(plot(options.runs, output=options.output, metrics=options.metric))
    return 0
