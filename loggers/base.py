"""The logger contract: where the numbers of a run go."""

from __future__ import annotations

from argparse import Namespace
from logging import getLogger
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..callbacks.base import Callback

log = getLogger("loopwright")


class Logger:
    """Writes the metrics and hyperparameters of a run. It is called in the main process only.

    Override :attr:`name`, :attr:`version` and :meth:`log_metrics`; the rest has defaults that do nothing.
    """

    root_dir: Any = None
    group_separator = "/"

    @property
    def name(self) -> str | None:
        """The experiment's name."""
        return None

    @property
    def version(self) -> int | str | None:
        """The run's version within the experiment."""
        return None

    @property
    def save_dir(self) -> str | None:
        """The folder under which the logger keeps its experiments."""
        return None

    @property
    def log_dir(self) -> str | None:
        """The folder of this run; the Trainer keeps checkpoints in its ``checkpoints`` folder."""
        return None

    @property
    def experiment(self) -> Any:
        """The object of the library behind the logger, for what this contract does not cover."""
        return None

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Write one row.

        Args:
            metrics: numbers by name, among them ``epoch``; from ``Engine.log``, also what else was given to it.
            step: completed optimizer steps.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override log_metrics(metrics, step)"
        )

    def claim(self) -> None:
        """A fit begins: choose a folder that no other run has. It is called before anybody reads :attr:`log_dir`."""

    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Record the hyperparameters of the run."""

    def log_graph(self, model: nn.Module, input_array: Tensor | None = None) -> None:
        """Record the model's graph.

        Args:
            model: the module.
            input_array: an example of what it takes; by default its ``example_input_array``.
        """

    def log_media(self, kind: str, name: str, media: dict[str, Any], step: int) -> None:
        """Record an image, a text, a table, a histogram or a sound; here, say once that it is left out.

        Args:
            kind: ``"image"``, ``"text"``, ``"table"``, ``"histogram"`` or ``"audio"``.
            name: what it is called.
            media: its plain values, see ``Media`` in ``loggers/media.py``.
            step: completed optimizer steps.
        """
        said = self.__dict__.setdefault("_left_out", set())
        if kind not in said:
            said.add(kind)
            log.warning(
                "%s cannot log %s, and leaves it out: %s",
                type(self).__name__,
                "audio" if kind == "audio" else f"{kind}s",
                name,
            )

    def after_save_checkpoint(self, checkpoint_callback: Callback) -> None:
        """A checkpoint was committed by ``checkpoint_callback``."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on in the same folder, as values that JSON can hold."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned: before the first row of a resumed run, which goes on after it.

        Also in a run that goes back to a checkpoint, after ``finalize("interrupted")``: rows after it are to be hidden.
        """

    def save(self) -> None:
        """Write out what is buffered."""

    def finalize(self, status: str) -> None:
        """The run ended with ``status`` ``"success"``, ``"failed"`` or ``"interrupted"``; close files."""
