"""Lightning's loggers."""

from __future__ import annotations

import functools
import logging
import os
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

from torch import Tensor

from ....loggers import CometLogger as NativeCometLogger
from ....loggers import Logger
from ....loggers import MLFlowLogger as NativeMLFlowLogger
from ....loggers import WandbLogger as NativeWandbLogger
from ....loggers.dummy import DummyLogger, NullObject
from ..imports import unserved
from .folder_loggers import CSVLogger, ExperimentWriter, TensorBoardLogger
from .utilities import MisconfigurationException, rank_zero_only

__all__ = [
    "_COMET_AVAILABLE",
    "_MLFLOW_AVAILABLE",
    "_MLFLOW_SYNCHRONOUS_AVAILABLE",
    "_NEPTUNE_AVAILABLE",
    "_TENSORBOARDX_AVAILABLE",
    "_TENSORBOARD_AVAILABLE",
    "_WANDB_AVAILABLE",
    "CSVLogger",
    "CometLogger",
    "DummyExperiment",
    "DummyLogger",
    "ExperimentWriter",
    "LitLogger",
    "Logger",
    "MLFlowLogger",
    "NeptuneLogger",
    "TensorBoardLogger",
    "WandbLogger",
    "_add_prefix",
    "_convert_params",
    "_flatten_dict",
    "_get_resolve_tags",
    "_sanitize_callable_params",
    "_sanitize_params",
    "_scan_checkpoints",
    "rank_zero_experiment",
]

DummyExperiment = NullObject


log = logging.getLogger("loopwright")


def _is_installed(module: str) -> bool:
    return find_spec(module) is not None


# Loggers of services. As Lightning's, they wait until the service's library has taken a row, though not for a service
# that does not answer.

_ANSWER_SECONDS = 2.0
_WANDB_AVAILABLE = _is_installed("wandb")
_MLFLOW_AVAILABLE = _is_installed("mlflow")
_MLFLOW_SYNCHRONOUS_AVAILABLE = _MLFLOW_AVAILABLE
_COMET_AVAILABLE = _is_installed("comet_ml")
_NEPTUNE_AVAILABLE = _is_installed("neptune")
_TENSORBOARD_AVAILABLE = _is_installed("tensorboard")
_TENSORBOARDX_AVAILABLE = _is_installed("tensorboardX")


class WandbLogger(NativeWandbLogger):
    """A :class:`~loopwright.loggers.WandbLogger` whose project is ``lightning_logs`` by default."""

    answer_seconds = _ANSWER_SECONDS
    default_project = "lightning_logs"

    def __init__(
        self,
        name: str | None = None,
        save_dir: Any = ".",
        version: str | None = None,
        offline: bool = False,
        dir: Any = None,
        id: str | None = None,
        anonymous: bool | None = None,
        project: str | None = None,
        log_model: Literal["all"] | bool = False,
        experiment: Any = None,
        prefix: str = "",
        checkpoint_name: str | None = None,
        add_file_policy: Literal["mutable", "immutable"] = "mutable",
        **kwargs: Any,
    ) -> None:
        if offline and log_model:
            raise MisconfigurationException(
                f"log_model={log_model} and offline={offline}: checkpoints cannot be uploaded in offline mode"
            )
        super().__init__(
            name,
            save_dir,
            version,
            offline,
            dir,
            id,
            anonymous,
            project,
            log_model,
            experiment,
            prefix,
            checkpoint_name,
            add_file_policy,
            **kwargs,
        )
        self._wandb_init.setdefault("anonymous", None)

    def begin(self) -> tuple[Any, str]:
        if self._offline:
            os.environ["WANDB_MODE"] = "dryrun"
        return super().begin()

    def init_options(self) -> dict[str, Any]:
        return {**self._wandb_init, "id": self._run_id}

    @property
    def version(self) -> str | None:
        if self._experiment is not None:
            return self._experiment.id
        return super().version

    def describe(self, callback: Any) -> dict[str, Any]:
        return {**super().describe(callback), **_schedule_of(callback)}

    def __getstate__(self) -> dict[str, Any]:
        # The run belongs to the process that has made the logger; others join it.
        self.claim()
        return super().__getstate__()

    def log_audio(
        self, key: str, audios: list[Any], step: int | None = None, **kwargs: Any
    ) -> None:
        """Log ``wandb.Audio``s.

        Args:
            key: under which they appear.
            audios: what ``wandb.Audio`` takes.
            step: completed optimizer steps.
            **kwargs: lists with an argument of ``wandb.Audio`` for each, such as ``sample_rate``.
        """
        self._log_objects("Audio", "audios", key, audios, step, kwargs)

    def log_video(
        self, key: str, videos: list[Any], step: int | None = None, **kwargs: Any
    ) -> None:
        """Log ``wandb.Video``s.

        Args:
            key: under which they appear.
            videos: what ``wandb.Video`` takes.
            step: completed optimizer steps.
            **kwargs: lists with an argument of ``wandb.Video`` for each, such as ``fps``.
        """
        self._log_objects("Video", "videos", key, videos, step, kwargs)

    @staticmethod
    def download_artifact(
        artifact: str,
        save_dir: str | os.PathLike[str] | None = None,
        artifact_type: str | None = None,
        use_artifact: bool | None = True,
    ) -> str:
        """Download an artifact; returns the folder.

        Args:
            artifact: its path at W&B.
            save_dir: where to.
            artifact_type: of which type it is.
            use_artifact: let the run that is in progress say that it uses it.
        """
        import wandb

        if wandb.run is not None and use_artifact:
            found = wandb.run.use_artifact(artifact)
        else:
            found = wandb.Api().artifact(artifact, type=artifact_type)
        return found.download(root=None if save_dir is None else os.fspath(save_dir))

    def use_artifact(self, artifact: str, artifact_type: str | None = None) -> Any:
        """Say that the run uses an artifact; returns it.

        Args:
            artifact: its path at W&B.
            artifact_type: of which type it is.
        """
        return self.experiment.use_artifact(artifact, type=artifact_type)


def _schedule_of(callback: Any) -> dict[str, Any]:
    """How often a callback saves, as Lightning's metadata have it."""
    return {"_every_n_train_steps": callback.every_n_train_steps}


class MLFlowLogger(NativeMLFlowLogger):
    """A :class:`~loopwright.loggers.MLFlowLogger` in the experiment ``lightning_logs``, in a store of files."""

    answer_seconds = _ANSWER_SECONDS

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        run_name: str | None = None,
        tracking_uri: str | None = os.environ.get("MLFLOW_TRACKING_URI"),
        tags: dict[str, Any] | None = None,
        save_dir: str | None = "./mlruns",
        log_model: Literal["all"] | bool = False,
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
        synchronous: bool | None = None,
    ) -> None:
        super().__init__(
            experiment_name,
            run_name,
            tracking_uri,
            tags,
            save_dir,
            log_model,
            prefix,
            artifact_location,
            run_id,
            synchronous,
        )

    def default_store(self, folder: str) -> str:
        uri = f"file:{self._save_dir}"
        try:
            from mlflow.tracking import MlflowClient

            MlflowClient(uri)
        except Exception as error:
            log.warning("MLFlowLogger uses SQLite in %s: %s", folder, error)
            return super().default_store(folder)
        return uri

    @property
    def save_dir(self) -> str | None:
        uri = self._tracking_uri
        if uri.startswith("file:"):
            return uri.removeprefix("file:")
        return self._save_dir if uri.startswith("sqlite:") else None

    def resolved_tags(self, tags: dict[str, Any] | None) -> dict[str, Any]:
        return _get_resolve_tags()(tags)

    def describe(self, callback: Any) -> dict[str, Any]:
        return {**super().describe(callback), **_schedule_of(callback)}


def _get_resolve_tags() -> Callable[..., Any]:
    """What adds the tags to a run's that MLflow finds."""
    try:
        from mlflow.tracking.context.registry import resolve_tags
    except ImportError:
        return lambda tags: tags
    return resolve_tags


class CometLogger(NativeCometLogger):
    """A :class:`~loopwright.loggers.CometLogger` that begins its experiment at once, and knows older arguments."""

    answer_seconds = _ANSWER_SECONDS
    _framework = "pytorch-lightning"

    def __init__(self, **kwargs: Any) -> None:
        for older, name in (("experiment_name", "name"), ("project_name", "project")):
            if older in kwargs:
                log.warning("CometLogger: use %s instead of %s", name, older)
                kwargs.setdefault(name, kwargs.pop(older))
        if "offline" in kwargs:
            log.warning("CometLogger: use online instead of offline")
            kwargs.setdefault("online", not kwargs.pop("offline"))
        super().__init__(**kwargs)
        if rank_zero_only.rank == 0:
            self.claim()

    @property
    def version(self) -> str | None:
        return None if self._experiment is None else self._experiment.get_key()

    def _log(self, values: dict[str, Any], step: Any, epoch: Any) -> None:
        self._experiment.__internal_api__log_metrics__(
            values,
            step=step,
            epoch=epoch,
            prefix=self._prefix,
            framework=self._framework,
        )

    def send_hparams(self, values: dict[str, Any]) -> None:
        self._experiment.__internal_api__log_parameters__(
            parameters=values,
            framework=self._framework,
            flatten_nested=True,
            source="manual",
        )

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        self.experiment.__internal_api__set_model_graph__(
            graph=model, framework=self._framework
        )


def rank_zero_experiment(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a logger's ``experiment``: in all processes but the main one it takes everything and does nothing."""

    @functools.wraps(function)
    def experiment(self: Any) -> Any:
        if rank_zero_only.rank > 0:
            return NullObject()
        return function(self) or NullObject()

    return experiment


# What the loggers of packages call.


def _convert_params(params: dict[str, Any] | Namespace | None) -> dict[str, Any]:
    """Hyperparameters as a dict."""
    if isinstance(params, Namespace):
        return vars(params)
    return {} if params is None else dict(params)


def _flatten_dict(
    params: dict[Any, Any], delimiter: str = "/", parent_key: str = ""
) -> dict[str, Any]:
    """A dict of dicts as one dict, whose keys are joined."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        name = f"{parent_key}{delimiter}{key}" if parent_key else str(key)
        if isinstance(value, Namespace):
            value = vars(value)
        if isinstance(value, dict):
            flat.update(_flatten_dict(value, delimiter, name))
        else:
            flat[name] = value
    return flat


def _sanitize_callable_params(params: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters with functions and classes named."""
    return {
        name: getattr(value, "__name__", str(value)) if callable(value) else value
        for name, value in params.items()
    }


def _sanitize_params(params: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters as plain numbers and texts; tensors stay."""
    plain = {}
    for name, value in params.items():
        if getattr(value, "ndim", None) == 0 and not isinstance(value, Tensor):
            # A number of NumPy's.
            value = value.item()
        is_plain = isinstance(value, (bool, int, float, str, Tensor))
        plain[name] = value if is_plain else str(value)
    return plain


def _scan_checkpoints(
    checkpoint_callback: Any, logged_model_time: dict[str, float]
) -> list[tuple[float, str, float, str]]:
    """The checkpoints that are there and new, oldest first.

    Args:
        checkpoint_callback: what has saved them.
        logged_model_time: the time of each path that is known already.

    Returns:
        For each: when it was written, its path, its score, and ``"latest"``, ``"best"`` or ``"best_k"``.
    """
    callback = checkpoint_callback
    kinds = {
        str(path): (score, "best_k") for path, score in callback.best_k_models.items()
    }
    kinds[str(callback.last_model_path)] = (
        getattr(callback, "current_score", None),
        "latest",
    )
    kinds[str(callback.best_model_path)] = (callback.best_model_score, "best")
    found = []
    for path, (score, tag) in kinds.items():
        if os.path.exists(path):
            found.append((os.path.getmtime(path), path, score, tag))
    found.sort(key=lambda checkpoint: checkpoint[:2])
    return [item for item in found if logged_model_time.get(item[1], -1.0) < item[0]]


def _add_prefix(
    metrics: dict[str, float], prefix: str, separator: str
) -> dict[str, float]:
    """Metrics whose names begin with a prefix."""
    if not prefix:
        return metrics
    return {f"{prefix}{separator}{name}": value for name, value in metrics.items()}


_OTHERS = "use one of loopwright.loggers, such as WandbLogger or MLFlowLogger, or a Logger of your own"
LitLogger = unserved("LitLogger", _OTHERS)
NeptuneLogger = unserved("NeptuneLogger", _OTHERS)
