"""A writer of predictions to files, in the order of the dataset."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from logging import getLogger
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .arguments import require_choice
from .prediction_formats import FORMATS, PredictionFile
from .prediction_writer import BasePredictionWriter, on_cpu

if TYPE_CHECKING:
    from ..framework import Module, Trainer

log = getLogger("loopwright")


class PredictionWriter(BasePredictionWriter):
    """Write what ``predict_step`` returns to a file with one row for each sample, in the order of the dataset.

    Each process writes a file of its own while it predicts. At the end, the main process puts them together: row *i* is
    that of sample *i*, whatever the order in which the loader gives them and however many processes there are, and
    the column ``index`` has *i*. A sample that a sampler gives twice, as ``DistributedSampler`` does to fill up, has
    one row.

    Where nobody knows the samples' indices, as in a stream, there is no column ``index``, and each process's rows stay
    in a file of its own, in the order in which they came.

    ``predict_step`` returns a tensor, array or list with an entry for each sample, which becomes the column
    ``prediction``; a dict of such columns, whose dicts become columns ``outer.inner``; or a tuple of them, which become
    ``prediction_0``, ``prediction_1``, ….

    Args:
        dirpath: the folder, a path or an fsspec URL. Default: the Trainer's ``log_dir``. With several loaders, the file
            of each has its number in its name. Files of that name that are there are replaced.
        file_format: ``"jsonl"``: a JSON object in each line; ``"parquet"``: a table (``pip install
            'loopwright[parquet]'``), or ``"safetensors"``: a tensor for each column, which is in memory until the end.
        filename: of the file, without its ending.
        merge: False leaves each process's rows in a file of its own: ``predictions.rank0.jsonl`` and so on.

    Attributes:
        paths: the files written in the last run, those of other processes too.

    Raises:
        ValueError: if ``file_format`` is none of these; in a run, if a prediction has no entry for each sample.
        ImportError: when a run begins, if pyarrow is needed and not installed.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        file_format: str = "jsonl",
        filename: str = "predictions",
        merge: bool = True,
    ) -> None:
        super().__init__("batch")
        require_choice("file_format", file_format, *FORMATS)
        self.dirpath = None if dirpath is None else os.fspath(dirpath)
        self.file_format = file_format
        self.filename = filename
        self.merge = merge
        self.paths: list[str] = []
        # By loader, this process's.
        self._files: list[PredictionFile] = []

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        # Each process alone might choose another folder.
        folder = self.dirpath or trainer.log_dir
        folder = trainer.strategy.broadcast(folder)  # collective
        kind = FORMATS[self.file_format]
        loaders = len(trainer.num_predict_batches)
        self._files = []
        for loader in range(loaders):
            number = f"-{loader}" if loaders > 1 else ""
            path = f"{folder}/{self.filename}{number}"
            self._files.append(kind(path, trainer.global_rank))
        if trainer.is_global_zero:
            for file in self._files:
                file.remove_old()
        # No process writes before the old files are gone.
        trainer.strategy.barrier()  # collective

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        # The others of a tensor-parallel group have the same rows.
        if trainer.global_rank % trainer.strategy.tensor_parallel_size:
            return
        columns = columns_of(on_cpu(prediction))
        if not columns:
            raise ValueError("PredictionWriter: predict_step returned nothing to write")
        indices = None
        if batch_indices is not None:
            indices = _plain(batch_indices)
        if "index" in columns and indices is not None:
            raise ValueError(
                "PredictionWriter: predict_step returned a column index, which is the name of the samples' indices; "
                "return it under another name"
            )
        sizes = {name: _length(column) for name, column in columns.items()}
        expected = next(iter(sizes.values())) if indices is None else len(indices)
        for name, size in sizes.items():
            if size is None or size != expected:
                raise ValueError(
                    f"PredictionWriter: {name} has {_told(size)} in a batch of {expected or 'some'} samples; "
                    "predict_step must return an entry for each sample; for other files, subclass BasePredictionWriter"
                )
        self._files[dataloader_idx].write(columns, indices)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        self.paths = []
        for file in self._files:
            file.close()
            parts = trainer.strategy.gather_objects(file.part)  # collective
            if trainer.is_global_zero:
                self.paths += self._merge(file, [part for part in parts if part])
        self.paths = trainer.strategy.broadcast(self.paths)  # collective
        self._files = []

    def _merge(self, file: PredictionFile, parts: list[Any]) -> list[str]:
        """Put the files of all processes together, where that is asked for and possible."""
        paths = [part.path for part in parts]
        if not self.merge or not parts:
            return paths
        reason = ""
        if len(parts) > 1 and not all(part.has_indices for part in parts):
            reason = "the loader does not tell which samples its batches hold"
        if not all(map(file.has, parts)):
            reason = "other machines have written to disks of their own"
        if not reason:
            return [file.merge(parts)]
        log.warning(
            "PredictionWriter: %s, so each process's predictions stay in a file of its own: %s",
            reason,
            ", ".join(paths),
        )
        return paths

    def on_exception(
        self, trainer: Trainer, pl_module: Module, exception: BaseException
    ) -> None:
        # What is not complete does not stay.
        for file in self._files:
            file.abandon()
        self._files = []


def columns_of(prediction: Any) -> dict[str, Any]:
    """The columns that a batch's prediction holds, by name.

    Raises:
        ValueError: if it is None.
    """
    if prediction is None:
        raise ValueError("PredictionWriter: predict_step returned None")
    if hasattr(prediction, "_asdict"):
        prediction = prediction._asdict()
    if isinstance(prediction, tuple):
        return {f"prediction_{i}": column for i, column in enumerate(prediction)}
    if not isinstance(prediction, Mapping):
        return {"prediction": prediction}
    columns = {}
    for name, value in prediction.items():
        if isinstance(value, Mapping):
            inner = columns_of(value)
            columns |= {f"{name}.{key}": column for key, column in inner.items()}
        else:
            columns[str(name)] = value
    return columns


def _plain(indices: Sequence[Any]) -> list[int] | None:
    """Indices as numbers; None for keys of another kind, which say nothing of an order."""
    try:
        return [operator.index(index) for index in indices]
    except TypeError:
        return None


def _length(column: Any) -> int | None:
    """How many entries a column has; None if it has none to count."""
    if isinstance(column, (str, bytes)):
        return None
    if isinstance(column, Tensor):
        return len(column) if column.dim() else None
    try:
        return len(column)
    except TypeError:
        return None


def _told(size: int | None) -> str:
    return "no entries" if size is None else f"{size} entries"
