"""`proximo report`: write a report of one or several runs."""

import argparse
from typing import Any

from proximo.cli.flags import expand_runs


def add_to(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "report",
        help="write an HTML report of runs",
        usage="proximo report RUN [RUN …] [options]",
        description="Write one HTML file with results, curves, analyses, videos and settings of runs, which needs no "
        "network. Runs that differ only in their seed are combined.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or folders of several seeds")
    parser.add_argument(
        "--output", metavar="FILE", help="HTML file [report.html, in the run folder if only one is given]"
    )


def run(options: argparse.Namespace) -> int:
    """Write the report, and print its path; return the exit status."""
    from proximo.report.page.write import write_report

    runs, output = expand_runs(options.runs, options.output, "report.html")
    print(write_report(runs, output))
    return 0
