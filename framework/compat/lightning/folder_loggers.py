"""Lightning's loggers that keep each run in a folder."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from torch import Tensor, nn

from ....loggers import CSVLogger as NativeCSVLogger
from ....loggers import TensorBoardLogger as NativeTensorBoardLogger
from ....loggers.files import exists
from .files import yaml_of
from .utilities import rank_zero_only, rank_zero_warn

__all__ = ["CSVLogger", "ExperimentWriter", "TensorBoardLogger"]


class _HyperparametersInYAML:
    """Names and writes the file of hyperparameters as Lightning's programs read it."""

    NAME_HPARAMS_FILE = "hparams.yaml"

    def hparams_text(self, hparams: Any) -> str:
        """What the file holds."""
        return yaml_of(hparams)


class TensorBoardLogger(_HyperparametersInYAML, NativeTensorBoardLogger):
    """A :class:`~loopwright.loggers.TensorBoardLogger` in Lightning's folder, ``lightning_logs``."""

    def __init__(
        self,
        save_dir: Any,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            save_dir,
            name,
            version,
            log_graph,
            default_hp_metric,
            prefix,
            sub_dir,
            **kwargs,
        )
        # Programs look for the file, also where there is nothing in it.
        self._hparams_written = False

    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: dict[str, float] | float | None = None,
        step: int | None = None,
    ) -> None:
        super().log_hyperparams(params, metrics, step)
        self._attempt(self._write_hparams)

    def log_graph(self, model: nn.Module, input_array: Any = None) -> None:
        example = input_array
        if example is None:
            example = getattr(model, "example_input_array", None)
        if self._log_graph and not isinstance(example, (Tensor, tuple)):
            reason = "can't be traced by TensorBoard"
            if example is None:
                reason = "was not given"
            rank_zero_warn(
                "Could not log computational graph to TensorBoard: The `model.example_input_array` or `input_array` "
                + reason
            )
            return
        super().log_graph(model, input_array)


class CSVLogger(_HyperparametersInYAML, NativeCSVLogger):
    """A :class:`~loopwright.loggers.CSVLogger` in Lightning's folder, ``lightning_logs``.

    It writes after steps whose number, from 1, is a multiple of ``flush_logs_every_n_steps``.
    """

    def __init__(
        self,
        save_dir: Any,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)
        self._experiment: ExperimentWriter | None = None

    @property
    def experiment(self) -> Any:
        """The :class:`ExperimentWriter` of this run; in other processes than the main one it does nothing."""
        if rank_zero_only.rank > 0:
            return super().experiment
        if self._experiment is None:
            self.claim()
            self._keep_files_aside()
            self._experiment = ExperimentWriter.of(self)
        return self._experiment

    def _keep_files_aside(self) -> None:
        """Make place for this run's file where another one has left its own."""
        if self._is_ours or not exists(self.metrics_file_path):
            return
        rank_zero_warn(
            f"Experiment logs directory {self.log_dir} exists and is not empty: its {self.NAME_METRICS_FILE} is "
            "another run's, and gets another name"
        )
        self.keep_aside(self.metrics_file_path)

    @property
    def waiting_rows(self) -> list[dict[str, Any]]:
        """Rows that are not written yet."""
        return self._rows

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        last = self._last_step if step is None else step
        if (last + 1) % self._flush_every == 0:
            self._attempt(self.save)
            self._flushed_step = last

    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().log_hyperparams({} if params is None else params)
        self._attempt(self._write_hparams)


class ExperimentWriter:
    """What writes the files of a :class:`CSVLogger`, for programs that call it themselves.

    Args:
        log_dir: the folder of the files.

    Attributes:
        NAME_METRICS_FILE: of the file of metrics.
        NAME_HPARAMS_FILE: of the file of hyperparameters.
    """

    NAME_METRICS_FILE = CSVLogger.NAME_METRICS_FILE
    NAME_HPARAMS_FILE = CSVLogger.NAME_HPARAMS_FILE

    def __init__(self, log_dir: str) -> None:
        parent, folder = os.path.split(os.fspath(log_dir).rstrip("/"))
        self._logger = CSVLogger(parent, name="", version=folder)

    @classmethod
    def of(cls, logger: CSVLogger) -> ExperimentWriter:
        """The writer of a logger."""
        writer = cls.__new__(cls)
        writer._logger = logger
        return writer

    @property
    def log_dir(self) -> str:
        """The folder of the files."""
        return self._logger.log_dir

    @property
    def metrics_file_path(self) -> str:
        """The file of metrics."""
        return self._logger.metrics_file_path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows that are not written yet."""
        return self._logger.waiting_rows

    @property
    def hparams(self) -> dict[str, Any]:
        """The hyperparameters."""
        return self._logger.hparams

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row.

        Args:
            metrics: numbers by name.
            step: of the row; by default one more than the highest before.
        """
        self._logger.log_metrics(metrics, step)

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Write hyperparameters."""
        self._logger.log_hyperparams(params)

    def save(self) -> None:
        """Write the rows that wait."""
        self._logger.save()
