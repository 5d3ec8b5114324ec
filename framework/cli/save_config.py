"""The callback that writes what a command line has read beside the run's logs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ...callbacks.base import Callback
from ..checkpoint.storage import storage_of, write_file
from ..errors import on_main_rank
from ..subclasses import overrides
from .parser import LoopwrightArgumentParser

if TYPE_CHECKING:
    from ..module import Module
    from ..trainer import Trainer


class SaveConfigCallback(Callback):
    """Writes the configuration into the run's folder, when the run begins.

    A run that resumes goes on in the folder of the one before, and its configuration stands beside that one's if it is
    another.

    Args:
        parser: which has read it.
        config: what was read.
        config_filename: the file's name.
        overwrite: whether a file of an earlier run may be replaced.
        multifile: whether parts that were read from files of their own are written to such files.
        save_to_log_dir: whether to write it there; without, a subclass's :meth:`save_config` does all.

    Raises:
        ValueError: if nothing would be saved.
    """

    def __init__(
        self,
        parser: LoopwrightArgumentParser,
        config: Any,
        config_filename: str = "config.yaml",
        overwrite: bool = False,
        multifile: bool = False,
        save_to_log_dir: bool = True,
    ) -> None:
        self.parser = parser
        self.config = config
        self.config_filename = config_filename
        self.overwrite = overwrite
        self.multifile = multifile
        self.save_to_log_dir = save_to_log_dir
        self.already_saved = False
        if not save_to_log_dir and not overrides(
            self, "save_config", SaveConfigCallback
        ):
            raise ValueError(
                "`save_to_log_dir=False` only makes sense where a subclass saves the configuration in its save_config"
            )

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Write the configuration, once."""
        if self.already_saved:
            return
        self.already_saved = True
        path = os.path.join(trainer.log_dir, self.config_filename)

        def save() -> None:
            if self.save_to_log_dir:
                self._write(trainer, path)
            self.save_config(trainer, pl_module, stage)

        on_main_rank(trainer.strategy, path, save)  # collective

    def save_config(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Save it somewhere else as well. Called in the main process only.

        Args:
            trainer: whose run begins.
            pl_module: its module.
            stage: what it is to do.
        """

    def _write(self, trainer: Trainer, path: str) -> None:
        storage = storage_of(path)
        text = self.parser.dump(self.config, skip_unset=False).encode()
        if storage.is_file(path) and not self.overwrite:
            if trainer.ckpt_path is None:
                raise RuntimeError(
                    f"{path} exists already. Aborting to avoid overwriting results of a previous run: remove it, or "
                    'pass save_config_kwargs={"overwrite": True} or save_config_callback=None'
                )
            path = _next_path(path, text)
        if not self.multifile:
            write_file(path, text)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.parser.save(
            self.config,
            path,
            skip_unset=False,
            overwrite=self.overwrite,
            multifile=True,
        )


def _next_path(path: str, content: bytes) -> str:
    """The first numbered path beside this one at which there is no other configuration, for a resumed run's."""
    stem, extension = os.path.splitext(path)
    storage = storage_of(path)
    number = 0
    candidate = path
    while storage.is_file(candidate) and storage.read(candidate) != content:
        number += 1
        candidate = f"{stem}.{number}{extension}"
    return candidate
