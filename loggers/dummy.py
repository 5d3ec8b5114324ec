"""What stands for a logger in all processes but the main one, and under ``fast_dev_run``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .base import Logger


@dataclass(frozen=True)
class LoggerFolders:
    """Where a logger writes, as the main process tells the others.

    Attributes:
        name, version, save_dir, log_dir: as those of :class:`Logger`.
    """

    name: str | None = None
    version: int | str | None = None
    save_dir: str | None = None
    log_dir: str | None = None

    @classmethod
    def of(cls, logger: Logger) -> LoggerFolders:
        """The folders of a logger; asking for them may choose the run's version."""
        return cls(
            logger.name,
            logger.version,
            logger.save_dir,
            logger.log_dir,
        )


class NullObject:
    """Takes every call, attribute, index and ``with``, and answers each with an object like itself. It is empty."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            # What Python asks for when it copies the object.
            raise AttributeError(name)
        return NullObject()

    def __call__(self, *args: Any, **kwargs: Any) -> NullObject:
        return self

    __getitem__ = __setitem__ = __enter__ = __exit__ = __call__

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True


class DummyLogger(NullObject, Logger):
    """Knows where the main process logs to, takes everything, and does nothing.

    So code that calls ``self.logger.experiment.add_image(...)`` runs in every process and writes once.

    Args:
        folders: those of the main process's logger; by default none.
    """

    def __init__(self, folders: LoggerFolders = LoggerFolders()) -> None:
        self._folders = folders

    @property
    def name(self) -> str | None:
        return self._folders.name

    @property
    def version(self) -> int | str | None:
        return self._folders.version

    @property
    def save_dir(self) -> str | None:
        return self._folders.save_dir

    @property
    def log_dir(self) -> str | None:
        return self._folders.log_dir

    @property
    def experiment(self) -> Any:
        return NullObject()

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_media(self, kind: str, name: str, media: dict[str, Any], step: int) -> None:
        pass
