"""Metrics for TensorBoard."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from logging import getLogger
from time import monotonic, sleep, time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .folders import FolderLogger, flat
from .media import markdown, middles, png_size, wav_format

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = getLogger("loopwright")

WRITE_INTERVAL_SECONDS = 1.0
FLUSH_INTERVAL_SECONDS = 30.0


class TensorBoardLogger(FolderLogger):
    """Write TensorBoard's event files and ``hparams.json`` in a numbered folder for each run.

    A resumed run hides the points that were logged after its checkpoint, so that none appears twice.

    Args:
        save_dir: under which all experiments are kept.
        name: the experiment; "" or None puts the runs into ``save_dir`` itself.
        version: the run: a number, or a folder's name. By default one more than the highest number there is.
        log_graph: also draw the module's graph, from its ``example_input_array``.
        default_hp_metric: show hyperparameters that come without a metric with one called ``hp_metric``, as
            TensorBoard lists no others.
        prefix: put before the name of each value, with a ``-``.
        sub_dir: a folder inside that of the run.
        **kwargs: further arguments of ``torch.utils.tensorboard.SummaryWriter``, such as ``flush_secs``.

    Raises:
        ModuleNotFoundError: if tensorboard is not installed.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None = "loopwright_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if find_spec("tensorboard") is None:
            raise ModuleNotFoundError(
                "TensorBoardLogger needs tensorboard: pip install tensorboard; or pass logger=False or a CSVLogger"
            )
        super().__init__(save_dir, name, version, prefix, sub_dir)
        self._log_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._kwargs = kwargs
        self._experiment: SummaryWriter | None = None
        # Values, step and time (seconds since 1970) of rows that are not written yet.
        self._rows: list[tuple[dict[str, Any], int, float]] = []
        # Those that the writer has, but maybe not the disk.
        self._unflushed: list[tuple[dict[str, Any], int, float]] = []
        # When to write and to flush them, on the monotonic clock.
        self._write_at = 0.0
        self._flush_at = 0.0
        # The step from which on a new event file hides the points of the files before it.
        self._purge_step: int | None = None
        # The training step of the last row, if it had one.
        self._last_row: int | None = None
        # Values, with their step, that are to be shown with the hyperparameters.
        self._hp_metrics: tuple[Mapping[str, float], int] | None = None

    @property
    def sub_dir(self) -> str | None:
        """The folder inside that of the run."""
        return self._sub_dir or None

    @property
    def experiment(self) -> SummaryWriter:
        """The ``SummaryWriter``, made when it is first asked for."""
        if self._experiment is None:
            from torch.utils.tensorboard import SummaryWriter

            self.claim()
            if self._purge_step is not None:
                _wait_for_a_later_name(self.log_dir)
            options = {"purge_step": self._purge_step, **self._kwargs}
            # It opens its file anew each time, wherever the program is then.
            folder = os.path.abspath(self.log_dir)
            self._experiment = SummaryWriter(folder, **options)
            self._purge_step = None
            self._write_hparams()
        return self._experiment

    def claim(self) -> None:
        super().claim()
        # It takes a while, and the first row is written inside the loop.
        import torch.utils.tensorboard  # noqa: F401

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = self._note_step(step)
        # Values of validation steps have no epoch, and count batches.
        if "epoch" in metrics:
            self._last_row = step
        row: dict[str, Any] = {}
        for name, value in metrics.items():
            tag = f"{self._prefix}{name}"
            if isinstance(value, Mapping):
                curves = {}
                for key, number in value.items():
                    curves[key] = _number(f"{tag}/{key}", number)
                row[tag] = curves
            else:
                row[tag] = _number(tag, value)
        self._rows.append((row, step, time()))
        now = monotonic()
        if now >= self._write_at:
            self._write_at = now + WRITE_INTERVAL_SECONDS
            self._attempt(self.save if now >= self._flush_at else self._hand_over)

    def _hand_over(self) -> None:
        """Write the rows that wait, without a flush.

        Raises:
            OSError: if the writer's thread has ended with it. What may be lost waits again, for a new writer.
        """
        try:
            if self._rows:
                self._write_rows()
        except OSError:
            self._leave_writer()
            raise

    def _leave_writer(self) -> None:
        """Let a new writer, a while later, write again what this one had; it hides what came to the disk of that."""
        if self._experiment is not None:
            with suppress(OSError):
                self._experiment.close()
            self._experiment = None
        self._rows = self._unflushed + self._rows
        self._unflushed = []
        steps = [step for _, step, _ in self._rows]
        if self._purge_step is None and steps:
            self._purge_step = min(steps)
        self._write_at = monotonic() + FLUSH_INTERVAL_SECONDS

    def _write_rows(self) -> None:
        """Hand over the rows that wait.

        Each time, the writer's thread takes the interpreter from the training step and leaves it cold caches: for
        steps of 0.1 ms, a row at a time made every step 7 µs slower, a second's rows together 1 µs.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore # made at run time

        writer = self.experiment
        for row, step, moment in self._rows:
            values = []
            for tag, value in row.items():
                if isinstance(value, dict):
                    writer.add_scalars(tag, value, step, moment)
                else:
                    values.append(Summary.Value(tag=tag, simple_value=value))
            # A row as one event costs as much as one add_scalar.
            self._add(Summary(value=values), step, moment)
        self._unflushed += self._rows
        self._rows = []

    def _add(self, summary: Any, step: int, moment: float | None = None) -> None:
        # As the writer's own methods do, which open it again if somebody has closed it.
        self.experiment._get_file_writer().add_summary(summary, step, moment)

    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: dict[str, float] | float | None = None,
        step: int | None = None,
    ) -> None:
        """Record hyperparameters, in ``hparams.json`` and for TensorBoard's HParams page.

        Args:
            params: by name; nested dicts are shown as ``outer/inner``.
            metrics: results to list beside them, by name, or one number.
            step: of ``metrics``.
        """
        super().log_hyperparams(params)
        # A resumed run, which has logged steps, has shown the default before.
        shows_default = self._default_hp_metric and self._last_step < 0
        if metrics is None and self._hp_metrics is None and shows_default:
            metrics = -1.0
        if metrics is not None:
            if not isinstance(metrics, Mapping):
                metrics = {"hp_metric": metrics}
            self._hp_metrics = (metrics, step or 0)
        if self._experiment is not None:
            self._write_hparams()

    def _write_hparams(self) -> None:
        if self._hparams_written:
            return
        super()._write_hparams()
        if self._hp_metrics is None:
            return
        from torch.utils.tensorboard.summary import hparams

        metrics, step = self._hp_metrics
        self._hp_metrics = None
        shown = {name: _showable(value) for name, value in flat(self.hparams)}
        # The page finds metrics by the names of their curves.
        curves = {f"{self._prefix}{name}": value for name, value in metrics.items()}
        for summary in hparams(shown, curves):
            self._add(summary, step)
        self.log_metrics(dict(metrics), step)

    def log_graph(self, model: nn.Module, input_array: Any = None) -> None:
        """Draw the graph of ``model``, if ``log_graph=True``."""
        if not self._log_graph:
            return
        example = input_array
        if example is None:
            example = getattr(model, "example_input_array", None)
        if not isinstance(example, (Tensor, tuple)):
            log.warning(
                "TensorBoardLogger(log_graph=True) needs module.example_input_array to be a tensor or a tuple"
            )
            return
        first = next(model.parameters(), torch.empty(0))
        inputs = (example,) if isinstance(example, Tensor) else example
        moved = tuple(
            value.to(first.device) if isinstance(value, Tensor) else value
            for value in inputs
        )
        with torch.random.fork_rng(devices=[]):
            self.experiment.add_graph(model, moved)

    def log_media(self, kind: str, name: str, media: dict[str, Any], step: int) -> None:
        writer = self.experiment
        tag = f"{self._prefix}{name}"
        if kind == "text":
            writer.add_text(tag, media["text"], step)
        elif kind == "table":
            writer.add_text(tag, markdown(media), step)
        elif kind == "histogram":
            self._add_histogram(tag, media, step)
        else:
            self._add_files(tag, kind, media, step)

    def _add_histogram(self, tag: str, media: dict[str, Any], step: int) -> None:
        edges = media["edges"]
        counts = media["counts"]
        total = sum(counts)
        pairs = list(zip(middles(media), counts, strict=True))
        self.experiment.add_histogram_raw(
            tag,
            min=edges[0],
            max=edges[-1],
            num=total,
            sum=sum(middle * count for middle, count in pairs),
            sum_squares=sum(middle**2 * count for middle, count in pairs),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )

    def _add_files(self, tag: str, kind: str, media: dict[str, Any], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore # made at run time

        if kind == "audio":
            rate, channels, frames = wav_format(media["wav"])
            sound = Summary.Audio(
                sample_rate=rate,
                num_channels=channels,
                length_frames=frames,
                encoded_audio_string=media["wav"],
                content_type="audio/wav",
            )
            self._add(Summary(value=[Summary.Value(tag=tag, audio=sound)]), step)
            return
        values = []
        for number, png in enumerate(media["png"]):
            height, width = png_size(png)
            image = Summary.Image(height=height, width=width, encoded_image_string=png)
            tag_of_image = tag if len(media["png"]) == 1 else f"{tag}/{number}"
            values.append(Summary.Value(tag=tag_of_image, image=image))
        self._add(Summary(value=values), step)

    def save(self) -> None:
        self._hand_over()
        try:
            if self._experiment is not None:
                self._experiment.flush()
        except OSError:
            self._leave_writer()
            raise
        self._unflushed = []
        self._flush_at = monotonic() + FLUSH_INTERVAL_SECONDS

    def finalize(self, status: str) -> None:
        self.save()
        if status == "success" and not self._hparams_written:
            # Making the writer writes the hyperparameters.
            self.experiment  # noqa: B018
        if self._experiment is not None:
            self._experiment.close()
            # What comes later goes into a new file of the same folder.
            self._experiment = None
        self._give_back()

    def state_dict(self) -> dict[str, Any]:
        # What the checkpoint knows of must not get lost after it.
        self._attempt(self.save)
        last_step = self._last_step if self._last_row is None else self._last_row
        return {**super().state_dict(), "last_step": last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._experiment is None and self._continues(state_dict):
            self._last_step = self._last_row = state_dict["last_step"]
            self._purge_step = self._last_step + 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_experiment": None}


def _wait_for_a_later_name(folder: str) -> None:
    """Wait until the next event file sorts behind those in ``folder``, as only then it can hide their points.

    Files of the same second are sorted by process and number, which say nothing of their order in time.
    """
    latest = 0
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.startswith("events.out.tfevents."):
            latest = max(latest, int(name.split(".")[3]))
    if latest > time():
        log.warning(
            "TensorBoardLogger: a file in %s is of a later time than now; its points may show twice",
            folder,
        )
    elif time() < latest + 1:
        sleep(latest + 1 - time())


def _number(tag: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"TensorBoardLogger takes numbers and dicts of numbers; {tag!r} is {value!r}"
        ) from None


def _showable(value: Any) -> bool | int | float | str:
    """A value that TensorBoard can show; of all else the ``str``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, (bool, int, str)) else str(value)
