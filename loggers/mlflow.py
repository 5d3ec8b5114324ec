"""Metrics for MLflow."""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from functools import cached_property
from logging import getLogger
from typing import Any

from .files import absolute
from .folders import flat
from .journal import Row
from .sender import OPEN_SECONDS
from .service import ServiceLogger, files_of, require

log = getLogger("loopwright")

# The longest parameter that all of its stores take, in letters, and how many parameters they take at once.
LONGEST_PARAMETER = 250
PARAMETERS_AT_ONCE = 100
# What the service says of a row that it will never take.
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")


class MLFlowLogger(ServiceLogger):
    """Write to MLflow: a run of it, which a resumed run goes on with.

    MLflow cannot take points back. So a resumed run asks for those that its run has, and sends none of them again.

    Args:
        experiment_name: the experiment; it is made if there is none of that name.
        run_name: as shown; the tag ``mlflow.runName``.
        tracking_uri: the server or store (default: the environment's ``MLFLOW_TRACKING_URI``, else SQLite's file
            ``mlflow.db`` in ``save_dir``).
        tags: of the run.
        save_dir: where rows are kept, and the default store.
        log_model: also upload checkpoints: ``"all"`` as they are saved, True at the end.
        prefix: put before the name of each value, with a ``-``.
        artifact_location: where a new experiment keeps its files (default: the server's choice; of the default store,
            ``artifacts`` in ``save_dir``).
        run_id: of the run to go on with.
        synchronous: as of ``MlflowClient.log_batch``. A thread calls it in any case.

    Raises:
        ModuleNotFoundError: if mlflow is not installed, or SQLAlchemy for a store that is a database.
    """

    rows_at_once = 100

    def __init__(
        self,
        experiment_name: str = "loopwright_logs",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: dict[str, Any] | None = None,
        save_dir: str | os.PathLike[str] | None = "./mlruns",
        log_model: bool | str = False,
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
        synchronous: bool | None = None,
    ) -> None:
        require("MLFlowLogger", "mlflow", "mlflow-skinny sqlalchemy alembic")
        super().__init__(experiment_name, save_dir, run_id, prefix, log_model)
        tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not tracking_uri:
            folder = absolute(self._save_dir or ".")
            tracking_uri = self.default_store(folder)
            if artifact_location is None and tracking_uri.startswith("sqlite:"):
                artifact_location = os.path.join(folder, "artifacts")
        if tracking_uri.startswith("sqlite:"):
            require("MLFlowLogger", "sqlalchemy", "sqlalchemy alembic")
        self._tracking_uri = tracking_uri
        self._run_name = run_name
        self.tags = tags
        self._artifact_location = artifact_location
        self._experiment_id: str | None = None
        self._initialized = False
        # Parameters that the run had before; MLflow refuses to change them.
        self._parameters: dict[str, str] = {}
        self._options = {} if synchronous is None else {"synchronous": synchronous}

    def default_store(self, folder: str) -> str:
        """The tracking URI, if none is given."""
        os.makedirs(folder, exist_ok=True)
        return f"sqlite:///{folder}/mlflow.db"

    @cached_property
    def _mlflow_client(self) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(self._tracking_uri)

    def begin(self) -> tuple[Any, str]:
        import mlflow

        client = self._mlflow_client
        mlflow.set_tracking_uri(self._tracking_uri)
        if self._run_id is not None:
            run = client.get_run(self._run_id)
            self._experiment_id = run.info.experiment_id
            if run.info.status != "RUNNING":
                client.update_run(self._run_id, status="RUNNING")
        else:
            self._experiment_id = self._find_experiment(client)
            run = client.create_run(
                experiment_id=self._experiment_id,
                tags=self.resolved_tags(self._tags_with_name()),
            )
        self._initialized = True
        return client, run.info.run_id

    def _find_experiment(self, client: Any) -> str:
        found = client.get_experiment_by_name(self._project)
        if found is not None and found.lifecycle_stage != "deleted":
            return found.experiment_id
        return client.create_experiment(
            name=self._project, artifact_location=self._artifact_location
        )

    def resolved_tags(self, tags: dict[str, Any] | None) -> dict[str, Any]:
        """Tags with those that MLflow finds, such as the user's and the program's name."""
        from mlflow.tracking.context.registry import resolve_tags

        return resolve_tags(tags)

    def _tags_with_name(self) -> dict[str, Any] | None:
        if self._run_name is not None:
            name = "mlflow.runName"
            if self.tags and name in self.tags:
                log.warning("run_name=%r overrides the tag %s", self._run_name, name)
            self.tags = {**(self.tags or {}), name: self._run_name}
        return self.tags

    def recall(self, earlier: list[Row], sent: int, dropped: list[Row]) -> list[Row]:
        if not earlier and not dropped:
            return []
        client = self._experiment
        data = client.get_run(self._run_id).data
        self._parameters = data.params
        self._known = {
            (name, point.step)
            for name in data.metrics
            for point in client.get_metric_history(self._run_id, name)
        }
        # What a kill has kept from the store is sent again; of files, what was not sent.
        return [
            row
            for number, row in enumerate(earlier)
            if number >= sent or row["kind"] == "metrics"
        ]

    def is_refused(self, error: Exception) -> bool:
        code = getattr(error, "error_code", None)
        return code in REFUSALS or super().is_refused(error)

    @property
    def experiment_id(self) -> str | None:
        """The experiment's id; asking for it begins the run."""
        self.claim()
        return self._experiment_id

    @property
    def run_id(self) -> str | None:
        """The run's id; asking for it begins the run."""
        self.claim()
        return self._run_id

    @property
    def name(self) -> str | None:
        return self.experiment_id

    @property
    def version(self) -> str | None:
        self._sender.wait(OPEN_SECONDS, opened=True)
        return super().version

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        taken = {}
        for name, value in metrics.items():
            if isinstance(value, str):
                log.warning("MLflow takes numbers: left out %s=%s", name, value)
                continue
            clean = re.sub("[^a-zA-Z0-9_/. -]+", "", name)
            if clean != name:
                warnings.warn(
                    "MLflow only allows '_', '/', '.' and ' ' as special characters in metric name: "
                    f"{name} becomes {clean}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            taken[clean] = value
        super().log_metrics(taken, step)

    def send_metrics(self, rows: list[Row]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(
                key=name,
                value=value,
                timestamp=int(row["time"] * 1000),
                step=row["step"] or 0,
            )
            for row in rows
            for name, value in row["values"].items()
        ]
        # It takes a thousand at once.
        for start in range(0, len(metrics), 1000):
            self._experiment.log_batch(
                run_id=self._run_id,
                metrics=metrics[start : start + 1000],
                **self._options,
            )

    def send_hparams(self, values: Row) -> None:
        from mlflow.entities import Param

        params = []
        for name, value in flat(values):
            text = str(value)[:LONGEST_PARAMETER]
            known = self._parameters.get(name)
            if known is None:
                self._parameters[name] = text
                params.append(Param(key=name, value=text))
            elif known != text:
                log.warning(
                    "MLflow keeps a run's parameters: %s stays %s, and is %s now",
                    name,
                    known,
                    text,
                )
        for start in range(0, len(params), PARAMETERS_AT_ONCE):
            self._experiment.log_batch(
                run_id=self._run_id,
                params=params[start : start + PARAMETERS_AT_ONCE],
                **self._options,
            )

    def send_media(self, kind: str, name: str, media: Row, step: int) -> None:
        client = self._experiment
        stem = f"{kind}s/{name}-{step}"
        if kind == "text":
            client.log_text(self._run_id, media["text"], f"{stem}.txt")
        elif kind in ("table", "histogram"):
            client.log_text(self._run_id, json.dumps(media), f"{stem}.json")
        else:
            with files_of(kind, name, media, step) as paths:
                for path in paths:
                    client.log_artifact(self._run_id, path, f"{kind}s")

    def send_graph(self, text: str) -> None:
        self._experiment.log_text(self._run_id, text, "model.txt")

    def send_checkpoint(self, path: str, row: Row) -> None:
        client = self._experiment
        name = os.path.splitext(os.path.basename(path))[0]
        if os.path.isdir(path):
            client.log_artifacts(self._run_id, path, f"{name}/{os.path.basename(path)}")
        else:
            client.log_artifact(self._run_id, path, name)
        with tempfile.TemporaryDirectory() as folder:
            # JSON is YAML, too.
            with open(os.path.join(folder, "metadata.yaml"), "w") as file:
                json.dump(row["metadata"], file, indent=1, default=str)
            with open(os.path.join(folder, "aliases.txt"), "w") as file:
                file.write(str(row["aliases"]))
            client.log_artifacts(self._run_id, folder, name)

    def send_value(self, value: Any) -> None:
        if "status" not in value:
            raise TypeError(f"MLflow takes numbers; got {value['values']!r}")
        if self._experiment.get_run(self._run_id):
            self._experiment.set_terminated(self._run_id, value["status"])

    def finalize(self, status: str = "success") -> None:
        names = {"success": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
        if self._initialized:
            super().finalize(status)
            ended = names.get(status, status.upper())
            self._sender.put(None, {"status": ended})
        self._sender.finish()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_mlflow_client", None)
        return state
