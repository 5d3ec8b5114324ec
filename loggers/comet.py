"""Metrics for Comet."""

from __future__ import annotations

import os
from glob import escape, glob
from typing import Any

from .files import move_aside
from .folders import flat
from .journal import Row
from .media import middles
from .service import ServiceLogger, files_of, require


class CometLogger(ServiceLogger):
    """Write to Comet: an experiment of it, which a resumed run goes on with.

    Offline, Comet packs its archive when the program ends. A resumed run writes all rows again, from its own file, into
    a new archive of the same experiment, and moves the older one into the folder ``replaced`` beside it.

    Args:
        api_key: default: Comet's own configuration.
        workspace: default: the account's.
        project: default: the account's.
        experiment_key: of the experiment to go on with, or to make; 32 to 50 letters and digits.
        mode: ``"get_or_create"``, ``"get"`` or ``"create"``, as of ``comet_ml.start``.
        online: False writes to an archive, which ``comet upload`` uploads.
        prefix: put before the name of each value, with a ``_``, by Comet.
        log_model: also upload checkpoints: ``"all"`` as they are saved, True at the end.
        save_dir: where rows are kept (default: ``offline_directory``, else the working directory).
        **kwargs: further arguments of ``comet_ml.ExperimentConfig``, such as ``name``, ``tags``, ``offline_directory``.

    Raises:
        ModuleNotFoundError: if comet_ml is not installed.
    """

    def __init__(
        self,
        *,
        api_key: str | None = None,
        workspace: str | None = None,
        project: str | None = None,
        experiment_key: str | None = None,
        mode: str | None = None,
        online: bool | None = None,
        prefix: str | None = None,
        log_model: bool | str = False,
        save_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        require("CometLogger", "comet_ml", "comet_ml")
        folder = save_dir or kwargs.get("offline_directory")
        super().__init__(project, folder, experiment_key, prefix, log_model)
        if self._save_dir is not None:
            kwargs.setdefault("offline_directory", self._save_dir)
        self._start = {
            "api_key": api_key,
            "workspace": workspace,
            "mode": mode,
            "online": online,
        }
        self._kwargs = kwargs
        # Comet patches other libraries to log by themselves, if it is not told otherwise before it is imported.
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")

    def begin(self) -> tuple[Any, str]:
        import comet_ml

        experiment = comet_ml.start(
            **self._start,
            project=self._project,
            experiment_key=self._run_id,
            experiment_config=comet_ml.ExperimentConfig(**self._kwargs),
        )
        experiment.log_other("Created from", "loopwright")
        return experiment, experiment.get_key()

    def recall(self, earlier: list[Row], sent: int, dropped: list[Row]) -> list[Row]:
        import comet_ml

        if not isinstance(self._experiment, comet_ml.OfflineExperiment):
            return super().recall(earlier, sent, dropped)
        if earlier:
            folder = self._experiment.offline_directory
            archives = glob(os.path.join(folder, f"{escape(self._run_id or '')}*.zip"))
            # The last is the one that this experiment has just begun.
            move_aside(sorted(archives, key=os.path.getmtime)[:-1])
        return earlier

    def send_metrics(self, rows: list[Row]) -> None:
        for row in rows:
            values = dict(row["values"])
            self._log(values, row["step"], values.pop("epoch", None))

    def send_value(self, value: Any) -> None:
        self._log(value["values"], value["step"], None)

    def _log(self, values: Row, step: int | None, epoch: int | None) -> None:
        self._experiment.log_metrics(
            values, prefix=self._prefix, step=step, epoch=epoch
        )

    def prefixed(self, name: str) -> str:
        return name

    def send_hparams(self, values: Row) -> None:
        self._experiment.log_parameters(dict(flat(values)))

    def send_graph(self, text: str) -> None:
        self._experiment.set_model_graph(text)

    def send_media(self, kind: str, name: str, media: Row, step: int) -> None:
        experiment = self._experiment
        if kind == "text":
            experiment.log_text(media["text"], step=step, metadata={"name": name})
        elif kind == "table":
            experiment.log_table(
                f"{name}-{step}.csv", media["rows"], headers=media["columns"]
            )
        elif kind == "histogram":
            # It takes values: the middles of the bins, as often as they occur.
            bins = zip(middles(media), media["counts"], strict=True)
            values = [middle for middle, count in bins for _ in range(count)]
            experiment.log_histogram_3d(values, name=name, step=step)
        else:
            with files_of(kind, name, media, step) as paths:
                for path in paths:
                    if kind == "image":
                        experiment.log_image(path, name=name, step=step)
                    else:
                        experiment.log_audio(path, file_name=name, step=step)

    def send_checkpoint(self, path: str, row: Row) -> None:
        name = os.path.basename(path)
        self._experiment.log_model(name, path, metadata=row["metadata"])

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.flush()

    def close(self) -> None:
        self._experiment.end()
