"""Collect Python's garbage in all processes at once."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from .arguments import require_choice, require_int
from .base import Callback
from .intervals import steps_of

if TYPE_CHECKING:
    from ..framework import Module, Trainer


class GarbageCollection(Callback):
    """Collect Python's garbage every so many steps, and at no other moment of the training.

    Left to itself, Python collects in each process at a moment of its own. Processes that train together wait for each
    other in each step, so they wait for each collection of each of them. Here they all collect at the same step.

    What is there when the training begins, such as modules and imported code, is left out of the collections until it
    ends, which makes them short.

    Args:
        every_n_train_steps: optimizer steps from one collection to the next.
        generation: how much to collect: 0 is the newest objects, 2 all.
        every: instead of ``every_n_train_steps``, the same as text: ``"100 steps"``.

    Raises:
        ValueError: if one of them is not such a number.
    """

    def __init__(
        self,
        every_n_train_steps: int = 100,
        generation: int = 2,
        *,
        every: str | None = None,
    ) -> None:
        every_n_train_steps = steps_of("every", every, every_n_train_steps)
        require_int("every_n_train_steps", every_n_train_steps, least=1)
        require_choice("generation", generation, 0, 1, 2)
        self.every_n_train_steps = every_n_train_steps
        self.generation = generation
        self._next_step = 0
        # Whether this has switched Python's own collections off.
        self._has_disabled = False

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        gc.collect()
        gc.freeze()
        self._has_disabled = gc.isenabled()
        gc.disable()
        self._set_next(trainer)

    def _set_next(self, trainer: Trainer) -> None:
        # Counted from step 0, so that a resumed run collects where the whole one would.
        every = self.every_n_train_steps
        self._next_step = (trainer.global_step // every + 1) * every

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step >= self._next_step:
            gc.collect(self.generation)
            self._set_next(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Module) -> None:
        if self._has_disabled:
            # A long evaluation leaves much behind.
            gc.collect(self.generation)

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._let_python_collect()

    def on_exception(
        self, trainer: Trainer, pl_module: Module, exception: BaseException
    ) -> None:
        self._let_python_collect()

    def _let_python_collect(self) -> None:
        if self._has_disabled:
            self._has_disabled = False
            gc.unfreeze()
            gc.enable()
