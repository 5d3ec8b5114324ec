"""``loopwright plan``: the memory that a program's training would take, before it takes any."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from .options import Option, add_options, at_least, options_by_name, split_arguments

OPTIONS = (
    Option(
        ("--memory",),
        "of each device, as 80GB or 24GiB; default: that of the device here",
    ),
    Option(
        ("--accelerator",),
        "the kind of device to plan for; default: the Trainer's",
        choices=("cpu", "gpu", "cuda", "mps", "xpu"),
    ),
    Option(
        ("--devices",),
        "number of processes; may be given several times; default: the Trainer's",
        at_least(1),
        repeated=True,
    ),
    Option(
        ("--strategy",),
        "single, ddp, fsdp, deepspeed_stage_2 or deepspeed_stage_3; may be given several times; default: all",
        repeated=True,
    ),
    Option(
        ("--precision",),
        "a precision; may be given several times; default: the Trainer's, and beside 32-true also bf16-mixed",
        repeated=True,
    ),
    Option(
        ("--micro-batch",),
        "samples that a process computes at a time; may be given several times; default: the loader's batch, and "
        "halves of it until something fits",
        at_least(1),
        repeated=True,
    ),
    Option(
        ("--margin",), "the part of the memory that stays free; default: 0.1", float
    ),
    Option(
        ("--json",),
        "write the plan there, too; - writes it to the terminal, and no table",
    ),
    Option(("--module", "-m"), "the program is a module, as in python -m", None),
)


def main(arguments: list[str]) -> int:
    """Run ``loopwright plan``.

    Args:
        arguments: those after the command's name.

    Returns:
        The exit code: 0 if something fits or if that is not known, 1 if nothing fits or nothing was planned.
    """
    parser = ArgumentParser(
        prog="loopwright plan",
        usage="loopwright plan [options] program.py [its arguments]",
        description="Run a program up to its first Trainer.fit, and tell how much memory that would take of each "
        "process, under each strategy. Nothing is trained, and no process is started.",
        allow_abbrev=False,
    )
    add_options(parser, OPTIONS)
    own, program = split_arguments(
        arguments, parser.error, options_by_name(OPTIONS), {}
    )
    options = parser.parse_args(own)
    if not program:
        parser.error("name a program whose training is to be planned")
    if not options.module and not os.path.exists(program[0]):
        parser.error(f"there is no file {program[0]!r}")
    # It imports torch, which takes seconds.
    from .plan_program import plan_program

    asked = _asked(options)
    plan = plan_program(program[0], program[1:], bool(options.module), asked)
    if plan is None:
        print(
            f"loopwright plan: {program[0]} ended without a call of Trainer.fit, so there is nothing to plan",
            file=sys.stderr,
        )
        return 1
    _show(plan, options.json)
    return int(plan.usable is not None and all(each.fits is False for each in plan))


def _asked(options: Namespace) -> dict[str, Any]:
    """Return the arguments of ``Trainer.plan``."""
    asked = {
        "memory": options.memory,
        "accelerator": options.accelerator,
        "devices": options.devices,
        "strategies": options.strategy,
        "precisions": options.precision,
        "micro_batches": options.micro_batch,
        "margin": options.margin,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _show(plan: Any, file: str | None) -> None:
    """Print a plan as a table, and write it as JSON."""
    if file is not None:
        text = json.dumps(plan.to_dict(), indent=1)
        if file == "-":
            print(text)
            return
        Path(file).write_text(text + "\n", encoding="utf-8")
    if not sys.stdout.isatty():
        # Unlike a rich table, it is not cut at some width.
        print(plan)
        return
    from rich.console import Console

    Console().print(plan)
    print(*plan.advice(), sep="\n")
