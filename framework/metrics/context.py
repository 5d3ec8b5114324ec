"""Where in the loop ``log`` is called, and with which options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..data.batches import batch_size_of
from .values import LoggedValue


class LogOptions(NamedTuple):
    """The arguments of ``Module.log`` but the name and the value, as they are explained there."""

    prog_bar: bool
    logger: bool | None
    on_step: bool | None
    on_epoch: bool | None
    reduce_fx: str | Callable[..., Any]
    enable_graph: bool
    sync_dist: bool | None
    add_dataloader_idx: bool
    batch_size: int | None
    rank_zero_only: bool


@dataclass
class LogContext:
    """Where in the loop ``log`` is called, which sets its defaults.

    Attributes:
        stage: ``"train"``, ``"validation"`` or ``"test"``; None outside of these.
        scope: ``"batch"`` or ``"epoch"``: what a value belongs to by default; None where nothing can be logged.
        values: what was logged in the stage, by name and index of the evaluation loader.
        batch: the running batch, whose first dimension is its weight in an epoch's mean; None between batches.
        batch_size: that dimension, once it has been needed.
        is_dummy: the batch only keeps this rank in step with the others: what is logged about it does not count.
        part: while a batch is run in parts, the running part's fraction of the samples, and whether it is the first.
        dataloader_idx: index of the running evaluation loader, if there are several.
        empty_loaders: the evaluation loaders that gave this rank no batch, by index; None stands for the only one.
        loaders_by_name: for each name that was logged with ``add_dataloader_idx=False``, the indices of the evaluation
            loaders for which it was logged.
    """

    stage: str | None = None
    scope: str | None = None
    values: dict[Any, LoggedValue] = field(default_factory=dict)
    batch: Any = None
    batch_size: int | None = None
    is_dummy: bool = False
    part: tuple[float, bool] | None = None
    dataloader_idx: int | None = None
    empty_loaders: set[int | None] = field(default_factory=set)
    loaders_by_name: dict[str, set[int]] = field(default_factory=dict)

    def enter_scope(self, scope: str | None) -> None:
        """From now on, values belong to a ``"batch"`` or the ``"epoch"`` by default; None if nothing can be logged."""
        self.scope = scope

    def enter_loader(self, dataloader_idx: int | None) -> None:
        """Go on to an evaluation loader; None if there is only one."""
        self.dataloader_idx = dataloader_idx

    def enter_batch(
        self, batch: Any, is_dummy: bool, part: tuple[float, bool] | None = None
    ) -> None:
        """Go on to a batch, or a part of one."""
        self.batch = batch
        self.batch_size = None
        self.is_dummy = is_dummy
        self.part = part

    def weight_of(
        self,
        entry: LoggedValue,
        batch_size: int | None,
    ) -> float:
        """The weight of a value in an epoch's mean: by default the batch's size, or 1 outside of batches.

        Args:
            entry: what is kept under the value's name.
            batch_size: as passed to ``log``.

        Raises:
            ValueError: if the batch does not show one size.
        """
        if entry.reduction != "mean":
            return 1.0
        if batch_size is not None:
            return batch_size
        if self.scope != "batch" or self.batch is None:
            return 1
        if self.batch_size is None:
            try:
                self.batch_size = batch_size_of(self.batch)
            except ValueError as error:
                raise ValueError(
                    f"log({entry.name!r}): an epoch's mean is weighted by batch size, and {error}; pass "
                    "batch_size=… to log"
                ) from None
        return self.batch_size
