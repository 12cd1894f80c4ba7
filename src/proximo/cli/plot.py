"""`proximo plot`: plot learning curves of one or several runs."""

import argparse
from typing import Any

from proximo.cli.flags import expand_runs


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "plot",
        help="plot returns, episode lengths and losses of runs",
        usage="proximo plot RUN [RUN …] [options]",
        description="Plot learning curves. Runs that differ only in their seed are combined: a line for their "
        "interquartile mean, a band for its 95 % bootstrap interval, and thin lines for the runs.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or folders of several seeds")
    parser.add_argument(
        "--output", metavar="FILE", help="PNG, SVG or PDF file [curves.png, in the run folder if only one is given]"
    )
    parser.add_argument("--metric", action="append", metavar="NAME", help="plot only this metric; may be repeated")


def run(options: argparse.Namespace) -> int:
    """Plot, and print the path of the figure; return the exit status."""
    from proximo.report.plot import plot

    runs, output = expand_runs(options.runs, options.output, "curves.png")
    print(plot(runs, output=output, metrics=options.metric))
    return 0
