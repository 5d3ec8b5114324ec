"""Runs a whole program on Loopwright that was written for Lightning."""

from __future__ import annotations

from ..program import run
from . import install


def main() -> None:
    """Run the program that the command line names, with imports of Lightning answered by Loopwright.

    Raises:
        SystemExit: if it names none.
    """
    run("loopwright.lightning", install)
