"""``loopwright report``: a page that shows runs; or the same while they go on, or in a terminal."""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from ..report.page.document import write_report
from ..report.page.folders import find_runs


def main(arguments: list[str]) -> int:
    """Write a page of runs, and print where it is.

    Args:
        arguments: of the command line.

    Returns:
        The exit code.
    """
    parser = _make_parser()
    options = parser.parse_args(arguments)
    try:
        # What is wrong with the paths is said before anything is served or drawn.
        find_runs(options.runs)
        if options.tui:
            from ..report.page.terminal import show

            return show(options.runs, live=options.live)
        if options.live:
            from ..report.page.live import serve

            return serve(options.runs, port=options.port, open_browser=options.open)
        file = write_report(options.runs, options.output)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"loopwright report: {error}", file=sys.stderr)
        return 2
    print(file)
    if options.open:
        import webbrowser
        from pathlib import Path

        webbrowser.open(Path(file).as_uri())
    return 0


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="loopwright report",
        description="Write one HTML file that shows runs: curves, where the time went, checkpoints, settings. "
        "It needs no network, and neither does this command.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's folder, or a folder with several; what TensorBoard, CSV and JSON-lines loggers of other trainers "
        "leave is read, too",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="default: report.html, in the run's folder, or in this one if there are several runs",
    )
    parser.add_argument(
        "--open", action="store_true", help="open the page in the browser"
    )
    parser.add_argument(
        "--live",
        action="store_true",
        help="serve the page on this machine and update it while the runs go on, until Ctrl-C",
    )
    parser.add_argument(
        "--port", type=int, default=0, help="of --live; default: any that is free"
    )
    parser.add_argument(
        "--tui", action="store_true", help="draw the curves in this terminal"
    )
    return parser
