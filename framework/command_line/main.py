"""The command ``loopwright``: which of its subcommands is asked for."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.metadata import version

from .unknown import no_such

COMMANDS = {
    "launch": "start a program in several processes, on one machine or several",
    "submit": "write the files that start a program on a cluster: SLURM, Kubernetes, Ray",
    "replay": "train a run again up to a step, and stop there: to look at a spike, a NaN, an exception",
    "batch": "tell which samples of the dataset a step of a run had",
    "diff": "tell where two runs differ: settings, the first step, the first module",
    "plan": "tell how much memory a program's training would take, and what fits",
    "env": "tell what is installed, and on which devices: for reports of bugs",
    "report": "show runs in one page, or in a terminal: curves, times, settings, failures",
    "migrate": "rewrite programs that were written for Lightning or Accelerate",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: those of the command line. Default: ``sys.argv``'s.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    command, *rest = arguments or ["--help"]
    # Each is imported when it is asked for, and imports what is heavy where it needs it.
    if command == "launch":
        from .launch import main as run
    elif command == "submit":
        from .submit.main import main as run
    elif command == "replay":
        from .replay import replay as run
    elif command == "batch":
        from .replay import batch as run
    elif command == "diff":
        from .diff import main as run
    elif command == "plan":
        from .plan import main as run
    elif command == "env":
        from .environment import main as run
    elif command == "report":
        from .report import main as run
    elif command == "migrate":
        from .migrate.main import main as run
    else:
        return _without_command(command)
    return run(rest)


def _without_command(argument: str) -> int:
    """Answer ``--help``, ``--version``, and what is no command."""
    lines = [f"  {name:<9} {summary}" for name, summary in COMMANDS.items()]
    parser = ArgumentParser(
        prog="loopwright",
        usage="loopwright [--help] [--version] COMMAND ...",
        description="commands:\n" + "\n".join(lines),
        epilog="loopwright COMMAND --help tells a command's options.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("loopwright"))
    if not argument.startswith("-"):
        parser.error(no_such("command", argument, list(COMMANDS)))
    parser.parse_args([argument])
    # It was neither of the options that end the program.
    parser.error("name a command")
