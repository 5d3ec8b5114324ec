"""Where a run's batches come from: the loaders of each stage, how many batches of them, and how they are moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .datamodule import DataModule
from .hooks import overrides
from .loaders import (
    INFINITE,
    CombinedEpochLoader,
    CombinedLoader,
    EpochLoader,
    loader_length,
)
from .module import Module

if TYPE_CHECKING:
    from .trainer import Trainer

_LOADERS = {
    "train": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


class RunData:
    """The loaders of a run.

    Attributes:
        given: the loaders passed to ``fit``, ``test`` and so on, by stage.
        loaders: by stage, the user's loaders as they are: one object for training, a list for the others.
        train: the training loader as the loop iterates it.
        num_batches: by stage, how many batches to run: a number for training, a list for the others.
    """

    def __init__(self, trainer: Trainer, module: Module, datamodule: DataModule | None, given: dict[str, Any]) -> None:
        self.trainer, self.module, self.datamodule, self.given = trainer, module, datamodule, given
        self.loaders: dict[str, Any] = {}
        self.num_batches: dict[str, Any] = {}
        self.train: EpochLoader | CombinedEpochLoader | None = None
        self.loaded_in_epoch: dict[str, int] = {}

    def has(self, stage: str) -> bool:
        """Whether there is a loader for ``stage``."""
        return self._source(stage) is not None

    def _source(self, stage: str) -> Callable[[], Any] | None:
        name = _LOADERS[stage]
        if (given := self.given.get(stage)) is not None:
            return lambda: given
        for owner, base in ((self.datamodule, DataModule), (self.module, Module)):
            if owner is not None and overrides(owner, name, base):
                return getattr(owner, name)
        return None

    # -- training ---------------------------------------------------------------------------------------------

    def load_train(self, again: bool = False) -> None:
        """Make the training loader, once.

        Raises:
            ValueError: if it is empty, or the limit does not go with it.
        """
        if self.train is not None and not again:
            return
        trainer = self.trainer
        if trainer.limit_train_batches == 0:
            self.num_batches["train"] = 0
            return
        source = self._source("train")
        assert source is not None, "checked before the run"
        loaders = self.loaders["train"] = source()
        self.loaded_in_epoch["train"] = trainer.state.epoch
        seed, shuffle = trainer.data_seed(), not trainer.overfit_batches
        combined = loaders
        if isinstance(loaders, dict) or (isinstance(loaders, (list, tuple)) and _holds_loaders(loaders)):
            combined = CombinedLoader(loaders, "max_size_cycle")
        if isinstance(combined, CombinedLoader):
            parts = [EpochLoader(loader, seed + i, shuffle) for i, loader in enumerate(combined.flattened)]
            self.train = CombinedEpochLoader(combined, parts)
        else:
            self.train = EpochLoader(combined, seed, shuffle)
        self.num_batches["train"] = limited(self.train.length, trainer.limit_train_batches, "limit_train_batches")
        if self.train.length == 0:
            raise ValueError(
                "the training loader is empty (its length is 0): check its dataset, and batch_size with drop_last=True"
            )

    # -- evaluation -------------------------------------------------------------------------------------------

    def load(self, stage: str, limit: int | float, again: bool = False) -> bool:
        """Make the loaders of ``"validate"``, ``"test"`` or ``"predict"``, once; False if there are none to run."""
        if limit == 0:
            self.num_batches.setdefault(stage, [])
            return False
        if stage not in self.loaders or again:
            source = self._source(stage)
            loaders = source() if source is not None else None
            if loaders is None:
                self.num_batches[stage] = []
                return False
            if isinstance(loaders, CombinedLoader):
                loaders = loaders.flattened if loaders.mode == "sequential" else [loaders]
            elif isinstance(loaders, dict):
                loaders = list(loaders.values())
            elif not (isinstance(loaders, (list, tuple)) and _holds_loaders(loaders)):
                loaders = [loaders]
            self.loaders[stage] = list(loaders)
            self.loaded_in_epoch[stage] = self.trainer.state.epoch
        lengths = [loader_length(loader) for loader in self.loaders[stage]]
        if 0 in lengths:
            raise ValueError(f"{stage} loader {lengths.index(0)} is empty (its length is 0): check its dataset")
        name = f"limit_{'val' if stage == 'validate' else stage}_batches"
        self.num_batches[stage] = [limited(length, limit, name) for length in lengths]
        return bool(lengths)

    def stale(self, stage: str, every_n_epochs: int) -> bool:
        """Whether the loaders of ``stage`` are to be made again for this epoch."""
        loaded = self.loaded_in_epoch.get(stage)
        return bool(every_n_epochs) and loaded is not None and self.trainer.state.epoch - loaded >= every_n_epochs

    # -- batches ----------------------------------------------------------------------------------------------

    def transfer(self) -> Callable[[Any, int], Any] | None:
        """A function that takes a batch and its loader's index through the transfer hooks; None if none is needed."""
        names = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
        hooks: list[Any] = []
        overridden = False
        for name in names:
            hook = getattr(self.module, name)
            for owner, base in ((self.module, Module), (self.datamodule, DataModule)):  # the data's own comes first
                if owner is not None and overrides(owner, name, base):
                    hook, overridden = getattr(owner, name), True
            hooks.append(hook)
        engine = self.trainer.engine
        if not overridden:
            return (lambda batch, _: engine.to_device(batch)) if engine.moves_batches else None
        before, move, after = hooks
        return lambda batch, index: after(move(before(batch, index), engine.device, index), index)


def _holds_loaders(items: Any) -> bool:
    """Whether a list holds loaders, rather than being one: a list of batches."""
    return (
        bool(items)
        and all(hasattr(item, "__iter__") and not hasattr(item, "shape") for item in items)
        and any(
            hasattr(item, "dataset") or hasattr(item, "__next__") or not isinstance(item, (list, tuple, dict, str))
            for item in items
        )
    )


def limited(length: int | float, limit: int | float, name: str) -> int | float:
    """How many of ``length`` batches to run under a limit: a count, or a fraction from 0.0 to 1.0.

    Raises:
        ValueError: for a fraction of an unknown length, or one so small that nothing would be left.
    """
    if isinstance(limit, int):
        return min(length, limit)
    if limit == 1.0:
        return length
    if length == INFINITE:
        raise ValueError(f"{name}={limit}: the loader has no length to take a fraction of; pass a number of batches")
    count = int(length * limit)
    if count == 0 and limit > 0 and length:
        raise ValueError(f"{name}={limit} of {length} batches is less than one batch; use at least {1 / length:.4g}")
    return count
