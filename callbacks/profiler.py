"""What profilers have in common: sections that a program measures, and where the results go."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .base import Callback

if TYPE_CHECKING:
    from ..framework import Module, Trainer


class Profiler(Callback):
    """The base of profilers, for ``Trainer(profiler=…)``. A subclass measures what ``start`` and ``stop`` are told.

    They are called for the sections that a program measures by ``trainer.profiler.profile(name)``, and for each
    training epoch (``run_training_epoch``), training batch (``run_training_batch``), backward pass (``backward``) and
    evaluation batch (such as ``validate_step``).

    At the end of each run, also if an exception ends it, the results are printed in the main process, and each process
    writes them to ``<stage>-<filename>.txt``; if there are several, its number comes after that name.

    Args:
        dirpath: the folder for results, a path or an fsspec URL. Default: the Trainer's ``log_dir``.
        filename: the results' name, without stage and ending; None only prints them.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
    ) -> None:
        self.dirpath = dirpath
        self.filename = filename
        self._folder = None if dirpath is None else os.fspath(dirpath)
        self._stage = ""
        # This process's number, where there are several.
        self._rank = ""
        self._is_main = True
        # The loop's sections that have begun, the innermost last.
        self._begun: list[str] = []

    def start(self, action_name: str) -> None:
        """A section begins.

        Args:
            action_name: its name.
        """

    def stop(self, action_name: str) -> None:
        """A section ends.

        Args:
            action_name: its name.
        """

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        """Measure a ``with`` block.

        Args:
            action_name: its name.
        """
        self.start(action_name)
        try:
            yield action_name
        finally:
            self.stop(action_name)

    def summary(self) -> str:
        """What was measured."""
        return ""

    def describe(self) -> None:
        """Print :meth:`summary` and write it to the file; done at the end of each run."""
        text = self.summary()
        if not text:
            return
        path = self.path_of(".txt")
        if path is not None:
            system, plain = destination(path)
            with system.open(plain, "w") as file:
                file.write(f"{text}\n")
        if self._is_main:
            self.show(text, path)

    def show(self, text: str, path: str | None) -> None:
        """Print the results.

        Args:
            text: the :meth:`summary`.
            path: where it was written to, if it was.
        """
        heading = f"Profile of {self._stage}:\n" if self._stage else ""
        print(f"{heading}{text}", flush=True)

    def path_of(self, ending: str, action_name: str = "") -> str | None:
        """A file of the results; None if there is no name or no folder for it.

        Args:
            ending: of its name.
            action_name: of the section that it is about.
        """
        if not self.filename or self._folder is None:
            return None
        parts = (self._stage, self.filename, self._rank, action_name)
        name = "-".join(filter(None, parts))
        safe = re.sub(r'[\\/:*?"<>|\s]+', "_", name)
        return f"{self._folder.rstrip('/')}/{safe}{ending}"

    # The run.

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self._stage = stage
        self._begun = []
        self._rank = str(trainer.global_rank) if trainer.world_size > 1 else ""
        self._is_main = trainer.is_global_zero
        folder = trainer.log_dir if self.dirpath is None else os.fspath(self.dirpath)
        # Each process alone might choose another version number.
        self._folder = trainer.strategy.broadcast(folder)  # collective

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        self.describe()

    def on_exception(
        self, trainer: Trainer, pl_module: Module, exception: BaseException
    ) -> None:
        self.describe()

    def _begin_section(self, section: str) -> None:
        """One of the loop's sections begins; one of that name that was left ends."""
        self._end_section(section)
        self._begun.append(section)
        self.start(section)

    def _end_section(self, section: str) -> None:
        """One of the loop's sections ends, with those inside it that were left; nothing if it has not begun.

        A run that is resumed inside an epoch, or goes back, is not told of the epoch's begin; and a batch that is left
        out has none.
        """
        while section in self._begun:
            self.stop(self._begun.pop())

    def on_train_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._end_section("run_training_epoch")
        if trainer.batch_idx:
            self._begin_section("run_training_epoch")

    def on_train_epoch_start(self, *_: Any, **__: Any) -> None:
        self._begin_section("run_training_epoch")

    def on_train_epoch_end(self, *_: Any, **__: Any) -> None:
        self._end_section("run_training_epoch")

    def on_train_batch_start(self, *_: Any, **__: Any) -> int | None:
        self._begin_section("run_training_batch")

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self._end_section("run_training_batch")

    def on_before_backward(self, *_: Any, **__: Any) -> None:
        self._begin_section("backward")

    def on_after_backward(self, *_: Any, **__: Any) -> None:
        self._end_section("backward")

    def _on_evaluation_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._begin_section(f"{trainer.state.stage}_step")

    def _on_evaluation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._end_section(f"{trainer.state.stage}_step")

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = (
        _on_evaluation_batch_start
    )
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = (
        _on_evaluation_batch_end
    )


def destination(path: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it, whose folder is there afterwards."""
    from fsspec.core import url_to_fs

    system, plain = url_to_fs(path)
    plain = str(plain)
    system.makedirs(plain.rpartition("/")[0], exist_ok=True)
    return system, plain
