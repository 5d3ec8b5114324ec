"""The errors that users meet, and how what one process raises is raised on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..strategies import Strategy


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used as asked; the message names it, what is wrong and the way out."""


def in_main_process(
    strategy: Strategy,
    path: str,
    write: Callable[[], Any],
    together: bool = True,
) -> None:
    """Let the main process write ``path``; if that fails, it fails in all of them. A collective, if ``together``."""
    failed: BaseException | None = None
    if strategy.is_global_zero:
        try:
            write()
        except Exception as error:
            failed = error
    if together:
        _, failed = exchange(strategy, path, failed)
    if failed is not None:
        raise failed


def exchange(
    strategy: Strategy,
    path: str,
    failed: BaseException | None,
    value: Any = None,
) -> tuple[list[Any], BaseException | None]:
    """Tell all processes what each has come to on the way to writing ``path``. A collective.

    Returns:
        The ``value`` of each, by rank; and what to raise, if anything failed anywhere: an OSError in all of them, or
        something else in all of them.
    """
    if (
        strategy.world_size == 1 or strategy.failed
    ):  # then the others are in another collective, or gone
        return [value], failed
    own = failed and (isinstance(failed, OSError), f"{type(failed).__name__}: {failed}")
    told = strategy.gather_objects((own, value))
    values = [each for _, each in told]
    guilty = next((rank for rank, (error, _) in enumerate(told) if error), None)
    if guilty is None:
        return values, None
    by_system, message = told[guilty][0]
    if failed is not None and isinstance(failed, OSError) == by_system:
        return values, failed
    error = (OSError if by_system else RuntimeError)(
        f"rank {guilty} could not save {path!r}: {message}"
    )
    error.__cause__ = failed
    return values, error
