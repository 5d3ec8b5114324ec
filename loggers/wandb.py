"""Metrics for Weights & Biases."""

from __future__ import annotations

import os
import warnings
from glob import escape, glob
from typing import Any, Literal

from torch import nn

from .files import move_aside
from .journal import Row
from .service import ServiceLogger, files_of, require

STEP = "trainer/global_step"


class WandbLogger(ServiceLogger):
    """Write to Weights & Biases: a run of it, which a resumed run goes on with.

    The x-axis of all is ``trainer/global_step``. Offline, W&B keeps what it has in memory until its run ends, and
    cannot go on with a run: so a resumed run writes all rows again, from its own file, into a new offline folder of the
    same run id, and moves the older one into ``wandb/replaced``.

    Args:
        name: of the run, as shown.
        save_dir: where W&B's folder ``wandb`` is, and rows are kept.
        version: id of the run to go on with.
        offline: write to files, which ``wandb sync`` uploads.
        dir: the same as ``save_dir``.
        id: the same as ``version``.
        anonymous: as of ``wandb.init``.
        project: default: the environment's ``WANDB_PROJECT``, else "loopwright_logs".
        log_model: also upload checkpoints as artifacts: ``"all"`` as they are saved, True at the end.
        experiment: a run that has begun.
        prefix: put before the name of each value, with a ``-``.
        checkpoint_name: of the artifact (default: ``model-<run id>``).
        add_file_policy: of ``wandb.Artifact.add_file``: ``"mutable"`` copies the file first.
        **kwargs: further arguments of ``wandb.init``.

    Raises:
        ModuleNotFoundError: if wandb is not installed.
    """

    default_project = "loopwright_logs"

    def __init__(
        self,
        name: str | None = None,
        save_dir: str | os.PathLike[str] | None = ".",
        version: str | None = None,
        offline: bool = False,
        dir: str | os.PathLike[str] | None = None,
        id: str | None = None,
        anonymous: bool | None = None,
        project: str | None = None,
        log_model: bool | str = False,
        experiment: Any = None,
        prefix: str = "",
        checkpoint_name: str | None = None,
        add_file_policy: Literal["mutable", "immutable"] = "mutable",
        **kwargs: Any,
    ) -> None:
        require("WandbLogger", "wandb", "wandb")
        project = project or os.environ.get("WANDB_PROJECT") or self.default_project
        folder = save_dir if save_dir is not None else dir
        run_id = version or id or getattr(experiment, "id", None)
        super().__init__(project, folder, run_id, prefix, log_model)
        self._offline = offline
        self._checkpoint_name = checkpoint_name
        self.add_file_policy: Any = add_file_policy
        # Arguments of `wandb.init`.
        self._wandb_init: dict[str, Any] = {
            "name": name,
            "project": project,
            "dir": self._save_dir,
            "id": run_id,
            "resume": "allow",
            **kwargs,
        }
        if anonymous:
            self._wandb_init["anonymous"] = "allow"
        self._given_run = experiment
        # Whether the run that is written to was there before this logger.
        self._is_joined = False

    def begin(self) -> tuple[Any, str]:
        import wandb

        run = self._given_run
        if run is None and wandb.run is not None:
            warnings.warn(
                "There is a wandb run already in progress, and this WandbLogger uses it. Call wandb.finish() before, "
                "if a new one is wanted",
                stacklevel=2,
            )
            run = wandb.run
        self._is_joined = run is not None
        if run is None:
            run = self._init_run(wandb)
        return run, run.id

    def init_options(self) -> Row:
        """The arguments of ``wandb.init``."""
        mode = {"mode": "offline"} if self._offline else {}
        return {**self._wandb_init, "id": self._run_id, **mode}

    def _init_run(self, wandb: Any) -> Any:
        options = self.init_options()
        run = wandb.init(**options)
        # What wandb gives for a run that is disabled has no x-axis.
        define = getattr(run, "define_metric", None)
        if define is not None and options.get("sync_tensorboard"):
            define("*", step_metric="global_step")
        elif define is not None:
            define(STEP)
            define("*", step_metric=STEP, step_sync=True)
        return run

    def recall(self, earlier: list[Row], sent: int, dropped: list[Row]) -> list[Row]:
        run = self._experiment
        if not earlier and not dropped:
            return []
        if self._is_joined or run.resumed is True:
            return super().recall(earlier, sent, dropped)
        # The service has nothing of this run.
        if earlier and run.offline is True:
            root, own = os.path.split(os.path.dirname(run.dir))
            folders = glob(os.path.join(root, f"offline-run-*-{escape(run.id)}"))
            move_aside(sorted(set(folders) - {os.path.join(root, own)}))
        return earlier

    def is_refused(self, error: Exception) -> bool:
        # Its bare `Error` says what a medium lacks, such as a library that encodes sounds.
        return type(error).__name__ == "Error" or super().is_refused(error)

    def send_metrics(self, rows: list[Row]) -> None:
        for row in rows:
            self._log(row["values"], row["step"])

    def send_value(self, value: Any) -> None:
        self._log(value["values"], value["step"])

    def _log(self, values: Row, step: int | None) -> None:
        if step is not None and not self._wandb_init.get("sync_tensorboard"):
            values = {**values, STEP: step}
        self._experiment.log(values)

    def send_hparams(self, values: Row) -> None:
        self._experiment.config.update(values, allow_val_change=True)

    def send_media(self, kind: str, name: str, media: Row, step: int) -> None:
        import wandb

        if kind == "text":
            self._log({name: wandb.Table(["text"], [[media["text"]]])}, step)
        elif kind == "table":
            self._log({name: wandb.Table(media["columns"], media["rows"])}, step)
        elif kind == "histogram":
            pair = (media["counts"], media["edges"])
            self._log({name: wandb.Histogram(np_histogram=pair)}, step)
        else:
            make = wandb.Image if kind == "image" else wandb.Audio
            with files_of(kind, name, media, step) as paths:
                captions = media.get("caption") or [None] * len(paths)
                pairs = zip(paths, captions, strict=True)
                shown = [make(path, caption=caption) for path, caption in pairs]
                self._log({name: shown}, step)

    def send_checkpoint(self, path: str, row: Row) -> None:
        import wandb

        if self._checkpoint_name is None:
            self._checkpoint_name = f"model-{self._experiment.id}"
        artifact = wandb.Artifact(
            name=self._checkpoint_name, type="model", metadata=row["metadata"]
        )
        if os.path.isdir(path):
            artifact.add_dir(path)
        else:
            artifact.add_file(path, name="model.ckpt", policy=self.add_file_policy)
        self._experiment.log_artifact(artifact, aliases=row["aliases"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_given_run": None}

    def watch(
        self,
        model: nn.Module,
        log: str | None = "gradients",
        log_freq: int = 100,
        log_graph: bool = True,
    ) -> None:
        """Let W&B log a module's gradients, parameters and graph, by hooks of its own.

        Args:
            model: the module.
            log: ``"gradients"``, ``"parameters"``, ``"all"`` or None.
            log_freq: every so many forwards.
            log_graph: the graph, too.
        """
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    def log_table(
        self,
        key: str,
        columns: Any = None,
        data: Any = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Log a ``wandb.Table``.

        Args:
            key: under which it appears.
            columns: their names.
            data: rows, whose cells may be W&B's media.
            dataframe: instead of both.
            step: completed optimizer steps.
        """
        import wandb

        table: Any = wandb.Table(columns=columns, data=data, dataframe=dataframe)
        self.log_metrics({key: table}, step)

    log_text = log_table

    def log_image(
        self, key: str, images: list[Any], step: int | None = None, **kwargs: Any
    ) -> None:
        """Log objects of ``wandb.Image``.

        Args:
            key: under which they appear.
            images: what ``wandb.Image`` takes.
            step: completed optimizer steps.
            **kwargs: lists with an argument of ``wandb.Image`` for each, such as ``caption``, ``masks``, ``boxes``.

        Raises:
            TypeError: if ``images`` is no list.
            ValueError: if a list of ``kwargs`` has another length.
        """
        self._log_objects("Image", "images", key, images, step, kwargs)

    def _log_objects(
        self, kind: str, argument: str, key: str, values: Any, step: Any, options: Row
    ) -> None:
        import wandb

        if not isinstance(values, list):
            raise TypeError(f'Expected a list as "{argument}", found {type(values)}')
        for name, each in options.items():
            if len(each) != len(values):
                raise ValueError(
                    f"Expected {len(values)} items but only found {len(each)} for {name}"
                )
        make = getattr(wandb, kind)
        made = [
            make(value, **{name: each[i] for name, each in options.items()})
            for i, value in enumerate(values)
        ]
        self.log_metrics({key: made}, step)  # type: ignore[dict-item]
