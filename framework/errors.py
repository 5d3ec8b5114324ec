"""The error that users may catch, and how an error of one rank is raised on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..strategies import Strategy


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used as asked; the message names it, what is wrong and the way out."""


class OtherRankError(OSError):
    """A rank could not do its part of a checkpoint, as another one tells: that one's own error is the one to show."""


def describe_error(error: BaseException) -> str:
    """Return an error in words, which are never none."""
    return str(error) or type(error).__name__


def on_main_rank(
    strategy: Strategy,
    path: str,
    write: Callable[[], Any],
    together: bool = True,
) -> None:
    """Let the main rank write ``path``. A collective, if ``together``.

    Args:
        strategy: of the ranks.
        path: what is written, for the error.
        write: called on the main rank.
        together: whether all ranks call this; otherwise an error is raised on the main rank only.

    Raises:
        OSError: if the file system refuses; on all ranks.
        RuntimeError: if something else fails; on the main rank, what ``write`` raised itself.
    """
    failure: BaseException | None = None
    if strategy.is_global_zero:
        try:
            write()
        except Exception as error:
            failure = error
    if together:
        _, failure = gather_outcomes(strategy, path, failure)
    if failure is not None:
        raise failure


def gather_outcomes(
    strategy: Strategy,
    path: str,
    failure: BaseException | None,
    value: Any = None,
) -> tuple[list[Any], BaseException | None]:
    """Tell all ranks whether each has done its part of writing ``path``. A collective.

    Args:
        strategy: of the ranks.
        path: what is written, for the error.
        failure: what went wrong on this rank, or None.
        value: what this rank has for the others.

    Returns:
        The values by rank; and the error to raise, if anything failed on any rank, or None. It is an OSError on all
        ranks, or on none.
    """
    # After a failure, the others are in another collective, or gone.
    if strategy.world_size == 1 or strategy.group.failed:
        return [value], failure
    kind = OSError if isinstance(failure, OSError) else RuntimeError
    is_own = failure is not None and not isinstance(failure, OtherRankError)
    message = f"{type(failure).__name__}: {failure}" if is_own else ""
    outcomes = strategy.gather_objects((value, kind, message))
    by_rank = [value for value, _, _ in outcomes]
    for rank, (_, first_kind, message) in enumerate(outcomes):
        if message:
            if is_own and kind is first_kind:
                return by_rank, failure
            error = first_kind(f"rank {rank} could not save {path!r}: {message}")
            error.__cause__ = failure
            return by_rank, error
    return by_rank, failure
