"""What stands for a logger in all processes but the main one."""

from __future__ import annotations

from typing import Any

from .base import Logger


class SilentLogger(Logger):
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

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what Python asks for when copying
            raise AttributeError(name)
        return _Nothing()  # a method that a logger has beyond the contract


class _Nothing:
    """Can be called, read and indexed, and entered; all of it gives the same nothing."""

    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
        return self

    def __getitem__(self, key: Any) -> _Nothing:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def place_of(logger: Logger) -> dict[str, Any]:
    """Where a logger writes to."""
    return {name: getattr(logger, name) for name in ("name", "version", "save_dir", "log_dir")}
