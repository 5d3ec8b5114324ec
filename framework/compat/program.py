"""Runs a whole program under another trainer's names, as Python runs it."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable


def run(package: str, install: Callable[[], None]) -> None:
    """Run the program that the command line names.

    Args:
        package: what ``python -m`` was given, such as ``"loopwright.lightning"``.
        install: answers the other trainer's imports from then on.

    Raises:
        SystemExit: if the command line names no program.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        raise SystemExit(
            f"usage: python -m {package} PROGRAM.py [ARGUMENTS]\n"
            f"       python -m {package} -m MODULE [ARGUMENTS]"
        )
    install()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        # As Python does for its own -m.
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    program = arguments[0]
    if not os.path.exists(program):
        raise SystemExit(f"python -m {package}: there is no file {program}")
    # As Python does for a script. The folder that -m has put there would hide modules beside the program.
    sys.path[0] = os.path.dirname(os.path.abspath(program))
    runpy.run_path(program, run_name="__main__")
