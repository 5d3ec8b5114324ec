"""What stands for a logger in all processes but the main one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .base import Logger

_PLACE = ("name", "version", "save_dir", "log_dir")


class _Nothing:
    """Can be called, read, indexed and entered; all of it gives the same nothing. It holds nothing, too."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what Python asks for when copying
            raise AttributeError(name)
        return _Nothing()

    def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
        return self

    __getitem__ = __setitem__ = __enter__ = __exit__ = __call__

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True


class SilentLogger(_Nothing, Logger):
    """Says where the main process logs to, and takes everything without doing anything.

    So code that calls ``self.logger.experiment.add_image(...)`` runs in every process and writes once.

    Args:
        place: what :func:`place_of` says of the main process's logger.
    """

    def __init__(self, place: dict[str, Any]) -> None:
        self._place = place

    @property
    def name(self) -> str | None:
        return self._place["name"]

    @property
    def version(self) -> int | str | None:
        return self._place["version"]

    @property
    def save_dir(self) -> str | None:
        return self._place["save_dir"]

    @property
    def log_dir(self) -> str | None:
        return self._place["log_dir"]

    @property
    def experiment(self) -> Any:
        return _Nothing()

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        pass


def place_of(logger: Logger) -> dict[str, Any]:
    """Where a logger writes to."""
    return {key: getattr(logger, key) for key in _PLACE}
