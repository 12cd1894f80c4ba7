"""`proximo plot`: plot learning curves of one or several runs."""

import argparse
from typing import Any

from proximo.cli.flags import seed_folders


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "plot",
        help="plot returns, episode lengths and losses of runs",
        usage="proximo plot RUN [RUN …] [options]",
        description="Plot learning curves. Runs that differ only in their seed are combined: a line for their mean, a "
        "band of one standard deviation.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or folders of several seeds")
    parser.add_argument(
        "--output", metavar="FILE", help="PNG, SVG or PDF file [curves.png, in the run folder if only one is given]"
    )
    parser.add_argument("--metric", action="append", metavar="NAME", help="plot only this metric; may be repeated")


def run(options: argparse.Namespace) -> int:
    """Plot, and print the path of the figure; return the exit status."""
    from proximo.report.plot import plot

    runs = [run for path in options.runs for run in seed_folders(path) or [path]]
    output = options.output
    if len(options.runs) == 1 and runs != options.runs and output is None:
        output = f"{options.runs[0]}/curves.png"
    print(plot(runs, output=output, metrics=options.metric))
    return 0
