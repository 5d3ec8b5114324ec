"""Runs a program that was written for Lightning: ``python -m loopwright.lightning PROGRAM ARGUMENTS``."""

from ..framework.compat.lightning.program import main

main()
