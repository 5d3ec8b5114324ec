"""Accelerate's trackers: where an Accelerator's ``log`` goes."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any

from ...messages import log
from .options import LoggerType, is_true
from .state import PartialState


def on_main_process(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a tracker's method to run in the main process only, unless the tracker is for all of them."""

    @wraps(function)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "main_process_only", False) and not (
            PartialState().is_main_process
        ):
            return None
        return function(self, *args, **kwargs)

    return run


class GeneralTracker:
    """What an Accelerator logs to; a subclass may be passed to it as ``log_with``.

    A subclass has ``name``, ``requires_logging_directory``, the property ``tracker``, and the two methods that raise
    here.

    Attributes:
        main_process_only: whether it is called in the main process alone.

    Raises:
        NotImplementedError: if it lacks one of these, when it is made.
    """

    main_process_only = True
    name: str
    requires_logging_directory: bool
    tracker: Any

    def __init__(self, _blank: bool = False) -> None:
        if _blank:
            return
        lacking = [
            name
            for name in ("name", "requires_logging_directory")
            if not hasattr(self, name)
        ]
        if "tracker" not in dir(self):
            lacking.append("tracker")
        if lacking:
            raise NotImplementedError(
                f"The implementation for this tracker class is missing the following required attributes. Please "
                f"define them in the class definition: {', '.join(lacking)}"
            )

    def start(self) -> None:
        """Begin, when the Accelerator's ``init_trackers`` is called."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record hyperparameters."""

    def log(
        self, values: dict[str, Any], step: int | None = None, **kwargs: Any
    ) -> Any:
        """Write one row.

        Args:
            values: by name.
            step: of the row.
            **kwargs: of the library behind the tracker.
        """

    def log_images(
        self, values: dict[str, Any], step: int | None = None, **kwargs: Any
    ) -> None:
        """Write images, as :meth:`log` does numbers."""

    def finish(self) -> None:
        """Close it: the training is over."""


class TensorBoardTracker(GeneralTracker):
    """Writes for TensorBoard, to the folder ``run_name`` of the logging directory.

    Args:
        run_name: the project's name.
        logging_dir: where.
        **kwargs: of torch's ``SummaryWriter``.
    """

    name = "tensorboard"
    requires_logging_directory = True

    def __init__(
        self, run_name: str, logging_dir: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        super().__init__()
        self.run_name = run_name
        self.logging_dir_param = logging_dir
        self.init_kwargs = kwargs

    @on_main_process
    def start(self) -> None:
        """Begin."""
        from torch.utils.tensorboard import SummaryWriter

        self.logging_dir = os.path.join(self.logging_dir_param, self.run_name)
        self.writer = SummaryWriter(self.logging_dir, **self.init_kwargs)

    @property
    def tracker(self) -> Any:
        """The ``SummaryWriter``."""
        return self.writer

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record hyperparameters."""
        self.writer.add_hparams(values, metric_dict={})
        self.writer.flush()
        folder = os.path.join(self.logging_dir, str(time.time()))
        os.makedirs(folder, exist_ok=True)
        # JSON is YAML, too.
        with open(os.path.join(folder, "hparams.yml"), "w", encoding="utf-8") as file:
            json.dump(values, file, indent=1, default=str)

    @on_main_process
    def log(
        self, values: dict[str, Any], step: int | None = None, **kwargs: Any
    ) -> None:
        """Write one row."""
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, global_step=step, **kwargs)
            elif isinstance(value, dict):
                self.writer.add_scalars(name, value, global_step=step, **kwargs)
            else:
                self.writer.add_scalar(name, value, global_step=step, **kwargs)
        self.writer.flush()

    @on_main_process
    def log_images(
        self, values: dict[str, Any], step: int | None = None, **kwargs: Any
    ) -> None:
        """Write images."""
        for name, images in values.items():
            self.writer.add_images(name, images, global_step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        """Close it."""
        self.writer.close()


class _ProjectTracker(GeneralTracker):
    """A tracker that is given a project's name, and arguments for the library behind it."""

    requires_logging_directory = False

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self.init_kwargs = kwargs


class _RunTracker(_ProjectTracker):
    """A tracker whose library has the object that Weights & Biases calls a run."""

    run: Any

    @property
    def tracker(self) -> Any:
        """The run."""
        return self.run

    @on_main_process
    def log(
        self, values: dict[str, Any], step: int | None = None, **kwargs: Any
    ) -> None:
        """Write one row."""
        self.run.log(values, step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        """Close it."""
        self.run.finish()


class WandBTracker(_RunTracker):
    """Writes to Weights & Biases.

    Args:
        run_name: the project's name.
        **kwargs: of ``wandb.init``.
    """

    name = "wandb"

    @on_main_process
    def start(self) -> None:
        """Begin."""
        import wandb

        self.run = wandb.init(project=self.run_name, **self.init_kwargs)

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record hyperparameters."""
        self.run.config.update(values, allow_val_change=True)

    @on_main_process
    def log_images(
        self, values: dict[str, Any], step: int | None = None, **kwargs: Any
    ) -> None:
        """Write images."""
        import wandb

        for name, images in values.items():
            self.log({name: [wandb.Image(image) for image in images]}, step, **kwargs)

    @on_main_process
    def log_table(
        self,
        table_name: str,
        columns: Any = None,
        data: Any = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a table.

        Args:
            table_name: its name.
            columns: names, as ``wandb.Table`` takes them.
            data: rows.
            dataframe: names and rows.
            step: of the row.
            **kwargs: of ``log``.
        """
        import wandb

        table = wandb.Table(columns=columns, data=data, dataframe=dataframe)
        self.log({table_name: table}, step, **kwargs)


class TrackioTracker(_RunTracker):
    """Writes to Trackio, in the main process.

    Args:
        run_name: the project's name.
        **kwargs: of ``trackio.init``.
    """

    name = "trackio"

    @on_main_process
    def start(self) -> None:
        """Begin."""
        import trackio

        self.run = trackio.init(project=self.run_name, **self.init_kwargs)

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record hyperparameters."""
        self.run.config.update(values)

    @on_main_process
    def log_images(
        self, values: dict[str, Any], step: int | None = None, **kwargs: Any
    ) -> None:
        """Write images."""
        import trackio

        for name, images in values.items():
            for number, image in enumerate(images):
                shown = trackio.Image(image)
                self.run.log({f"{name}/{number}": shown}, step=step, **kwargs)


class CometMLTracker(_ProjectTracker):
    """Writes to Comet.

    Args:
        run_name: the project's name.
        **kwargs: of ``comet_ml.start``.
    """

    name = "comet_ml"

    @on_main_process
    def start(self) -> None:
        """Begin."""
        import comet_ml

        self.writer = comet_ml.start(project_name=self.run_name, **self.init_kwargs)

    @property
    def tracker(self) -> Any:
        """The experiment."""
        return self.writer

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record hyperparameters."""
        self.writer.log_parameters(values)

    @on_main_process
    def log(
        self, values: dict[str, Any], step: int | None = None, **kwargs: Any
    ) -> None:
        """Write one row."""
        if step is not None:
            self.writer.set_step(step)
        for name, value in values.items():
            if isinstance(value, str):
                self.writer.log_other(name, value, **kwargs)
            elif isinstance(value, dict):
                self.writer.log_metrics(value, step=step, **kwargs)
            elif isinstance(value, (int, float)):
                self.writer.log_metric(name, value, step=step, **kwargs)

    @on_main_process
    def log_images(
        self, values: dict[str, Any], step: int | None = None, **kwargs: Any
    ) -> None:
        """Write images."""
        for name, images in values.items():
            for image in images:
                self.writer.log_image(image, name=name, step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        """Close it."""
        self.writer.end()


class MLflowTracker(GeneralTracker):
    """Writes to MLflow.

    Args:
        experiment_name: the experiment, if the environment's ``MLFLOW_EXPERIMENT_NAME`` names none.
        logging_dir: where MLflow keeps its files, if the environment names no server.
        run_id: the run to go on with (default: the environment's ``MLFLOW_RUN_ID``).
        tags: of the run, as a dict or JSON.
        nested_run: it is a part of a run that is open.
        run_name: the run's name.
        description: of the run.
    """

    name = "mlflow"
    requires_logging_directory = False
    # The longest value that MLflow takes for a parameter, and how many of them at once.
    _longest = 500
    _at_once = 100

    def __init__(
        self,
        experiment_name: str | None = None,
        logging_dir: str | os.PathLike[str] | None = None,
        run_id: str | None = None,
        tags: dict[str, Any] | str | None = None,
        nested_run: bool = False,
        run_name: str | None = None,
        description: str | None = None,
    ) -> None:
        super().__init__()
        self.experiment_name: Any = os.environ.get(
            "MLFLOW_EXPERIMENT_NAME", experiment_name
        )
        self.logging_dir = logging_dir
        self.run_id = os.environ.get("MLFLOW_RUN_ID", run_id)
        self.tags = json.loads(tags) if isinstance(tags, str) else tags
        asked = os.environ.get("MLFLOW_NESTED_RUN")
        self.nested_run = nested_run if asked is None else is_true(asked)
        self.run_name = run_name
        self.description = description

    @on_main_process
    def start(self) -> None:
        """Begin."""
        import mlflow

        experiment = mlflow.get_experiment_by_name(self.experiment_name)
        if experiment is None:
            experiment_id = mlflow.create_experiment(
                name=self.experiment_name,
                artifact_location=None
                if self.logging_dir is None
                else str(self.logging_dir),
                tags=self.tags,
            )
        else:
            experiment_id = experiment.experiment_id
        self.active_run = mlflow.start_run(
            run_id=self.run_id,
            experiment_id=experiment_id,
            run_name=self.run_name,
            nested=self.nested_run,
            tags=self.tags,
            description=self.description,
        )

    @property
    def tracker(self) -> Any:
        """The run."""
        return self.active_run

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record hyperparameters."""
        import mlflow

        short = {}
        for name, value in values.items():
            if len(str(value)) > self._longest:
                log.warning(
                    "MLflow takes values of %d letters at most: %r is left out",
                    self._longest,
                    name,
                )
            else:
                short[name] = value
        items = list(short.items())
        for start in range(0, len(items), self._at_once):
            mlflow.log_params(dict(items[start : start + self._at_once]))

    @on_main_process
    def log(
        self, values: dict[str, Any], step: int | None = None, **kwargs: Any
    ) -> None:
        """Write one row."""
        import mlflow

        numbers: dict[str, float] = {
            name: value
            for name, value in values.items()
            if isinstance(value, (int, float))
        }
        if left_out := sorted(values.keys() - numbers.keys()):
            log.warning("MLflow takes numbers: left out %s", ", ".join(left_out))
        mlflow.log_metrics(numbers, step=step)

    @on_main_process
    def log_figure(self, figure: Any, artifact_file: str, **save_kwargs: Any) -> None:
        """Write a figure.

        Args:
            figure: of matplotlib or plotly.
            artifact_file: its path in the run.
            **save_kwargs: of ``mlflow.log_figure``.
        """
        import mlflow

        mlflow.log_figure(figure=figure, artifact_file=artifact_file, **save_kwargs)

    @on_main_process
    def log_artifact(self, local_path: str, artifact_path: str | None = None) -> None:
        """Write a file.

        Args:
            local_path: the file.
            artifact_path: where to in the run.
        """
        import mlflow

        mlflow.log_artifact(local_path=local_path, artifact_path=artifact_path)

    @on_main_process
    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Write all files of a folder.

        Args:
            local_dir: the folder.
            artifact_path: where to in the run.
        """
        import mlflow

        mlflow.log_artifacts(local_dir=local_dir, artifact_path=artifact_path)

    @on_main_process
    def finish(self) -> None:
        """Close it."""
        import mlflow

        mlflow.end_run()


LOGGER_TYPE_TO_CLASS: dict[str, type[GeneralTracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandBTracker,
    "trackio": TrackioTracker,
    "comet_ml": CometMLTracker,
    "mlflow": MLflowTracker,
}


_BUILT_IN = frozenset(LOGGER_TYPE_TO_CLASS)


def register_tracker_class(tracker_class: type[GeneralTracker]) -> None:
    """Let ``log_with`` find a tracker of your own by its name.

    Args:
        tracker_class: made with the project's name, and with the logging directory if it requires one.

    Raises:
        ValueError: if it is no GeneralTracker, or does not tell its name or whether it requires a directory.
    """
    is_tracker = isinstance(tracker_class, type) and issubclass(
        tracker_class, GeneralTracker
    )
    if not is_tracker:
        raise ValueError(
            f"tracker_class must be a subclass of GeneralTracker; got {tracker_class!r}"
        )
    # What the base declares does not count.
    own = [vars(kind) for kind in tracker_class.__mro__ if kind is not GeneralTracker]
    for name in ("name", "requires_logging_directory"):
        if not any(name in attributes for attributes in own):
            raise ValueError(
                f"{tracker_class.__name__} must have an attribute {name!r}"
            )
    if tracker_class.name in LOGGER_TYPE_TO_CLASS:
        warnings.warn(f"the tracker {tracker_class.name!r} is replaced", stacklevel=2)
    LOGGER_TYPE_TO_CLASS[tracker_class.name] = tracker_class


def get_available_trackers() -> list[LoggerType]:
    """Those trackers whose libraries are installed."""
    return [LoggerType(name) for name in LOGGER_TYPE_TO_CLASS if find_spec(name)]


def filter_trackers(
    log_with: Any, logging_dir: str | os.PathLike[str] | None = None
) -> list[Any]:
    """The trackers that were asked for, as far as they can be served.

    Args:
        log_with: names, :class:`LoggerType`, trackers, or a list of such; ``"all"`` takes all that are installed.
        logging_dir: where trackers write that need a directory.

    Raises:
        ValueError: for a name that is not known, or without a directory where one is needed.
        NotImplementedError: for a tracker of Accelerate's that is not served.
    """
    if log_with is None:
        return []
    asked = log_with if isinstance(log_with, (list, tuple)) else [log_with]
    if "all" in [str(item) for item in asked]:
        own = [item for item in asked if isinstance(item, GeneralTracker)]
        return own + get_available_trackers()
    served = [_served(item, logging_dir) for item in asked]
    return list(dict.fromkeys(item for item in served if item is not None))


def _served(item: Any, logging_dir: Any) -> Any:
    """The tracker that an item of ``log_with`` asks for; None if its library is not installed."""
    is_class = isinstance(item, type) and issubclass(item, GeneralTracker)
    if isinstance(item, GeneralTracker) or is_class:
        return item
    name = str(item)
    is_registered = name in LOGGER_TYPE_TO_CLASS and name not in _BUILT_IN
    if not is_registered and name not in LoggerType.list():
        raise ValueError(
            f"Unsupported logging capability: {item}. Choose between {LoggerType.list()}"
        )
    if name not in LOGGER_TYPE_TO_CLASS:
        raise NotImplementedError(
            f"log_with={name!r} is not served here: {', '.join(LOGGER_TYPE_TO_CLASS)} are, and any GeneralTracker of "
            "your own"
        )
    if not is_registered and find_spec(name) is None:
        log.warning("log_with=%r: it is not installed, and left out", name)
        return None
    if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and logging_dir is None:
        raise ValueError(
            f"Logging with `{name}` requires a `logging_dir` to be passed in."
        )
    return name if is_registered else LoggerType(name)


class Trackers:
    """The part of the Accelerator that logs.

    Attributes:
        log_with: the trackers that were asked for.
        trackers: those that :meth:`init_trackers` has begun.
    """

    log_with: list[Any]
    trackers: list[GeneralTracker]
    logging_dir: Any

    def init_trackers(
        self,
        project_name: str,
        config: dict[str, Any] | None = None,
        init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Begin the trackers.

        Args:
            project_name: under which they keep what is logged.
            config: hyperparameters to record.
            init_kwargs: arguments of a tracker's constructor, by its name.
        """
        for item in self.log_with:
            tracker = item
            if isinstance(item, (str, LoggerType)):
                options = dict((init_kwargs or {}).get(str(item), {}))
                tracker = self._made(str(item), project_name, options)
            if not PartialState().is_main_process and tracker.main_process_only:
                # It stands for the one of the main process.
                self.trackers.append(tracker)
                continue
            tracker.start()
            self.trackers.append(tracker)
        if config is not None:
            for tracker in self._trackers_here():
                tracker.store_init_configuration(config)

    def _made(
        self, name: str, project_name: str, options: dict[str, Any]
    ) -> GeneralTracker:
        """The tracker of a name, which was not begun yet."""
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        if kind is MLflowTracker:
            return kind(**{"experiment_name": project_name, **options})
        arguments = [project_name]
        if kind.requires_logging_directory and "logging_dir" not in options:
            arguments.append(self.logging_dir)
        return kind(*arguments, **options)

    def _trackers_here(self) -> list[GeneralTracker]:
        """The trackers that are called in this process."""
        is_main = PartialState().is_main_process
        return [item for item in self.trackers if is_main or not item.main_process_only]

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """A tracker, by its name.

        Args:
            name: such as ``"tensorboard"``.
            unwrap: give what the tracker wraps, such as a ``SummaryWriter``.

        Raises:
            ValueError: if there is none of that name.
        """
        for tracker in self.trackers:
            if tracker.name == name:
                here = tracker in self._trackers_here()
                if not here:
                    return GeneralTracker(_blank=True)
                return tracker.tracker if unwrap else tracker
        if not PartialState().is_main_process:
            return GeneralTracker(_blank=True)
        raise ValueError(
            f"{name} is not an available tracker stored inside the `Accelerator`."
        )

    def log(
        self,
        values: dict[str, Any],
        step: int | None = None,
        log_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Write one row to the trackers.

        Args:
            values: by name.
            step: of the row.
            log_kwargs: further arguments of a tracker's ``log``, by its name.
        """
        for tracker in self._trackers_here():
            options = (log_kwargs or {}).get(tracker.name, {})
            tracker.log(values, step=step, **options)

    def log_images(
        self,
        values: dict[str, Any],
        step: int | None = None,
        log_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Write images to the trackers, as :meth:`log` does numbers."""
        for tracker in self._trackers_here():
            options = (log_kwargs or {}).get(tracker.name, {})
            tracker.log_images(values, step=step, **options)

    def finish_trackers(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers_here():
            tracker.finish()
