"""``loopwright replay`` and ``loopwright batch``: a step of an earlier run once more, and the samples that it had."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any


def replay(arguments: Sequence[str]) -> int:
    """Run ``loopwright replay``.

    Args:
        arguments: those after the command's name.

    Returns:
        The exit code: 0, or that of the program if it failed.
    """
    parser = ArgumentParser(
        prog="loopwright replay",
        usage="loopwright replay RUN --step N [options] [-- command]",
        description="Train a run again up to a step, from its nearest checkpoint, and stop there with the module, the "
        "batch, the optimizer and all random generators as they were. Nothing is logged or saved.",
        allow_abbrev=False,
    )
    _add_step(parser)
    parser.add_argument(
        "--debugger",
        action="store_true",
        help="open pdb before the step, and where it raises",
    )
    parser.add_argument(
        "--detect-anomaly",
        action="store_true",
        help="raise at the first loss or gradient that is not finite, from the checkpoint on",
    )
    parser.add_argument(
        "--trace",
        default="",
        metavar="FILE",
        help="write what each module computes in the step",
    )
    options, command = _read(parser, arguments)
    return _rerun(
        options,
        command,
        debugger=options.debugger,
        detect_anomaly=options.detect_anomaly,
        trace=options.trace,
    )


def batch(arguments: Sequence[str]) -> int:
    """Run ``loopwright batch``.

    Args:
        arguments: those after the command's name.

    Returns:
        The exit code: 0, or that of the program if it failed.
    """
    parser = ArgumentParser(
        prog="loopwright batch",
        usage="loopwright batch RUN --step N [--rank R] [-- command]",
        description="Tell which samples of the dataset a training step had, and show them. The program is run up to "
        "its loaders, and trains nothing.",
        allow_abbrev=False,
    )
    _add_step(parser)
    options, command = _read(parser, arguments)
    return _rerun(options, command, shows_batch=True)


def _add_step(parser: ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="the run's log folder, in which its record lies"
    )
    parser.add_argument(
        "--step",
        type=int,
        required=True,
        metavar="N",
        help="the optimizer step, counted from 1 as in logged rows",
    )
    parser.add_argument(
        "--rank", type=int, default=0, metavar="R", help="of which process; default: 0"
    )


def _read(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Any, list[str]]:
    """Return the options, and what stands after ``--``."""
    own = list(arguments)
    command = []
    if "--" in own:
        place = own.index("--")
        own, command = own[:place], own[place + 1 :]
    return parser.parse_args(own), command


def _rerun(options: Any, command: list[str], **how: Any) -> int:
    # This imports torch, which takes seconds.
    from ..report.rerun import RerunError, rerun

    try:
        return rerun(options.run, options.step, options.rank, command=command, **how)
    except RerunError as error:
        print(f"loopwright: {error}", file=sys.stderr)
        return 2
