"""Runs a whole program under another trainer's names, as Python runs it."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Sequence


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
    is_module = arguments[0] == "-m"
    if is_module:
        arguments = arguments[1:]
    program = arguments[0]
    if not is_module and not os.path.exists(program):
        raise SystemExit(f"python -m {package}: there is no file {program}")
    run_as_main(program, arguments[1:], is_module)


def run_as_main(program: str, arguments: Sequence[str], is_module: bool) -> None:
    """Run a program in this process, as Python runs its main module; ``sys.argv`` and ``sys.path`` become its own.

    Args:
        program: a file, or the name of a module.
        arguments: the program's.
        is_module: whether it is a module.
    """
    sys.argv = [program, *arguments]
    # In the place of the folder of what this process was started with, which would hide modules beside the program.
    if is_module:
        sys.path[0] = os.getcwd()
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(program))
        runpy.run_path(program, run_name="__main__")
