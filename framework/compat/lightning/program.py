"""Runs a whole program on Loopwright that was written for Lightning."""

from __future__ import annotations

import os
import runpy
import sys

from . import install

_USAGE = (
    "usage: python -m loopwright.lightning PROGRAM.py [ARGUMENTS]\n"
    "       python -m loopwright.lightning -m MODULE [ARGUMENTS]"
)


def main() -> None:
    """Run the program that the command line names, with imports of Lightning answered by Loopwright.

    Raises:
        SystemExit: if it names none.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        raise SystemExit(_USAGE)
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
        raise SystemExit(f"python -m loopwright.lightning: there is no file {program}")
    # As Python does for a script. The folder that -m has put there would hide modules beside the program.
    sys.path[0] = os.path.dirname(os.path.abspath(program))
    runpy.run_path(program, run_name="__main__")
