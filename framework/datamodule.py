"""The data of a run in one object."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .data.device_input import move_batch
from .hparams import HyperparametersMixin

if TYPE_CHECKING:
    from typing_extensions import Self

    from .trainer import Trainer


class DataHooks:
    """What a :class:`DataModule` and a :class:`Module` can both do: prepare data, make loaders, move batches."""

    @property
    def trainer(self) -> Trainer | None:
        """The Trainer that runs with this object, if any."""
        return self.__dict__.get("_trainer")

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self.__dict__["_trainer"] = trainer

    def prepare_data(self) -> None:
        """Download and prepare; called in one process per machine. Set no state here."""

    def setup(self, stage: str) -> None:
        """A run begins: make datasets. ``stage`` is ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``."""

    def teardown(self, stage: str) -> None:
        """A run ended normally; not called after an exception."""

    def train_dataloader(self) -> Any:
        """Return the training loader (or a list or dict of them), unless ``fit`` is given one."""
        raise NotImplementedError

    def val_dataloader(self) -> Any:
        """Return the validation loader, or a list of them."""
        raise NotImplementedError

    def test_dataloader(self) -> Any:
        """Return the test loader, or a list of them."""
        raise NotImplementedError

    def predict_dataloader(self) -> Any:
        """Return the loader to predict on, or a list of them."""
        raise NotImplementedError

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch before it moves to the device."""
        return batch

    def transfer_batch_to_device(
        self,
        batch: Any,
        device: torch.device,
        dataloader_idx: int,
    ) -> Any:
        """Move a batch to the device; override it for batches of a type that cannot be moved as others.

        Args:
            batch: the batch.
            device: where to.
            dataloader_idx: index of its loader, where there are several for evaluation.

        Returns:
            The batch on the device.
        """
        trainer = self.__dict__.get("_trainer")
        if trainer is None:
            return move_batch(batch, device)
        return trainer.engine.to_device(batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch after it moved to the device."""
        return batch


class DataModule(DataHooks, HyperparametersMixin):
    """Prepares data and makes loaders. Override what you need; a stage for which no loader is made does not run.

    Attributes:
        allow_zero_length_dataloader_with_multiple_devices: accepted for familiarity.
    """

    allow_zero_length_dataloader_with_multiple_devices = False

    def __init__(self) -> None:
        super().__init__()

    def on_exception(self, exception: BaseException) -> None:
        """An exception ends the run; it is raised again afterwards."""

    def state_dict(self) -> dict[str, Any]:
        """What to store in a checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned when the checkpoint was saved."""

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        weights_only: bool | None = None,
        **overrides: Any,
    ) -> Self:
        """Construct the data from a checkpoint's hyperparameters, and give it back its state.

        Args:
            checkpoint_path: a checkpoint directory or a pointer to one, local or any fsspec URL.
            weights_only: False lets the checkpoint's pickled objects be loaded, which can run code.
            **overrides: constructor arguments instead of the checkpoint's, or beside them.

        Raises:
            CheckpointError: if the checkpoint is damaged, needs ``weights_only=False``, or lacks an argument.
        """
        from .from_checkpoint import datamodule_from_checkpoint

        return datamodule_from_checkpoint(cls, checkpoint_path, weights_only, overrides)

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> Self:
        """Make a DataModule of datasets: training ones are shuffled, the others not.

        Args:
            train_dataset: dataset to train on, a list or dict of them that are read together, or None.
            val_dataset: dataset, or list or dict of datasets, to validate on, or None.
            test_dataset: the same to test on.
            predict_dataset: the same to predict.
            batch_size: samples per batch.
            num_workers: processes per loader.
            **kwargs: arguments of the class's constructor.

        Returns:
            A DataModule whose ``…_dataloader`` methods make the loaders.
        """
        from torch.utils.data import DataLoader, IterableDataset

        def loader(dataset: Any, shuffle: bool) -> DataLoader[Any]:
            return DataLoader(
                dataset,
                batch_size=batch_size,
                shuffle=shuffle and not isinstance(dataset, IterableDataset),
                num_workers=num_workers,
                pin_memory=torch.accelerator.is_available(),
            )

        def loaders(datasets: Any, shuffle: bool) -> Any:
            if isinstance(datasets, Mapping):
                return {
                    name: loader(value, shuffle) for name, value in datasets.items()
                }
            if isinstance(datasets, (list, tuple)):
                return [loader(dataset, shuffle) for dataset in datasets]
            return loader(datasets, shuffle)

        instance = cls(**kwargs)
        given = {
            "train": train_dataset,
            "val": val_dataset,
            "test": test_dataset,
            "predict": predict_dataset,
        }
        for name, datasets in given.items():
            if datasets is not None:
                make = partial(loaders, datasets, name == "train")
                setattr(instance, f"{name}_dataloader", make)
        return instance
