"""Runs a program that was written for Accelerate: ``python -m loopwright.accelerate PROGRAM ARGUMENTS``."""

from ..framework.compat.accelerate.imports import install
from ..framework.compat.program import run

run("loopwright.accelerate", install)
