"""Metrics for Trackio."""

from __future__ import annotations

import os
from typing import Any

from .journal import Row
from .service import ServiceLogger, files_of, require


class TrackioLogger(ServiceLogger):
    """Write to Trackio: a run of its local database or of a Space, which a resumed run goes on with.

    Trackio keeps its database in the folder that the environment's ``TRACKIO_DIR`` names. A resumed run asks it for the
    steps that the run has there, and sends none of them again.

    Args:
        project: under which runs are shown.
        name: of the run; that of an earlier one goes on with it.
        save_dir: where rows are kept.
        prefix: put before the name of each value, with a ``-``.
        log_model: also upload checkpoints as artifacts: ``"all"`` as they are saved, True at the end.
        **kwargs: further arguments of ``trackio.init``, such as ``space_id`` and ``group``.

    Raises:
        ModuleNotFoundError: if trackio is not installed.
    """

    def __init__(
        self,
        project: str = "loopwright_logs",
        name: str | None = None,
        save_dir: str | os.PathLike[str] | None = ".",
        prefix: str = "",
        log_model: bool | str = False,
        **kwargs: Any,
    ) -> None:
        require("TrackioLogger", "trackio", "trackio")
        super().__init__(project, save_dir, name, prefix, log_model)
        self._kwargs = {"embed": False, "resume": "allow", **kwargs}

    def begin(self) -> tuple[Any, str]:
        import trackio

        run = trackio.init(self._project or "", name=self._run_id, **self._kwargs)
        return run, run.name

    def recall(self, earlier: list[Row], sent: int, dropped: list[Row]) -> list[Row]:
        if "space_id" in self._kwargs or "server_url" in self._kwargs:
            # What is there cannot be asked for.
            return super().recall(earlier, sent, dropped)
        from trackio.sqlite_storage import SQLiteStorage

        if earlier or dropped:
            run = self._experiment
            self._known = {
                (name, row["step"])
                for row in SQLiteStorage.get_logs(run.project, run.name, run_id=run.id)
                for name in row
            }
        return earlier

    def send_metrics(self, rows: list[Row]) -> None:
        for row in rows:
            self._experiment.log(row["values"], step=row["step"])

    def send_value(self, value: Any) -> None:
        self._experiment.log(value["values"], step=value["step"])

    def send_hparams(self, values: Row) -> None:
        self._experiment.config.update(values)

    def send_media(self, kind: str, name: str, media: Row, step: int) -> None:
        import trackio

        run = self._experiment
        if kind == "text":
            run.log({name: trackio.Markdown(media["text"])}, step=step)
        elif kind == "table":
            table = trackio.Table(columns=media["columns"], data=media["rows"])
            run.log({name: table}, step=step)
        elif kind == "histogram":
            pair = (media["counts"], media["edges"])
            run.log({name: trackio.Histogram(np_histogram=pair)}, step=step)
        else:
            make = trackio.Image if kind == "image" else trackio.Audio
            with files_of(kind, name, media, step) as paths:
                for number, path in enumerate(paths):
                    key = name if len(paths) == 1 else f"{name}/{number}"
                    run.log({key: make(path)}, step=step)

    def send_checkpoint(self, path: str, row: Row) -> None:
        import trackio

        artifact = trackio.Artifact(
            f"model-{self._run_id}", type="model", metadata=row["metadata"]
        )
        add = artifact.add_dir if os.path.isdir(path) else artifact.add_file
        add(path)
        self._experiment.log_artifact(artifact, aliases=row["aliases"])

    def close(self) -> None:
        self._experiment.finish()
