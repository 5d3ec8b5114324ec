"""A user's program, run up to its ``fit``, which is planned instead."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..compat.program import run_as_main
from ..datamodule import DataModule
from ..report.plan.batches import first_batch
from ..report.plan.plan import Plan
from ..trainer import Trainer

# What a program is run up to.
_METHOD = "fit"


class _Planned(BaseException):
    """Ends the program, as nothing in it is to go on without the training."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan


def plan_program(
    program: str, arguments: Sequence[str], is_module: bool, options: dict[str, Any]
) -> Plan | None:
    """Run a program until it calls ``Trainer.fit``, and plan that.

    Args:
        program: a file, or the name of a module.
        arguments: the program's.
        is_module: whether it is a module.
        options: arguments of ``Trainer.plan``.

    Returns:
        The plan; None if the program came to its end before.
    """
    before = (sys.argv, sys.path[:])
    try:
        with _planning(options):
            run_as_main(program, arguments, is_module)
    except _Planned as planned:
        return planned.plan
    finally:
        sys.argv, sys.path[:] = before
    return None


@contextmanager
def _planning(options: dict[str, Any]) -> Iterator[None]:
    """Let ``fit`` plan. Nothing is started or written for it: that is done inside ``fit`` only."""
    fit = getattr(Trainer, _METHOD)

    def plan(
        self: Trainer,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
    ) -> None:
        batch = None
        if isinstance(train_dataloaders, DataModule):
            datamodule = train_dataloaders
        elif train_dataloaders is not None:
            batch = first_batch(train_dataloaders)
        raise _Planned(self.plan(model, batch, datamodule=datamodule, **options))

    setattr(Trainer, _METHOD, plan)
    try:
        yield
    finally:
        setattr(Trainer, _METHOD, fit)
