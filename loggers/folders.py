"""What the loggers that write files share: a numbered folder for each run, and its hyperparameters."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from logging import getLogger
from typing import Any

from .base import Logger
from .files import (
    absolute,
    exists,
    filesystem,
    is_local,
    make_folder,
    next_version,
    write_text,
)

log = getLogger("loopwright")


class FolderLogger(Logger):
    """The base of loggers that keep each run in a folder, ``save_dir/name/version_N``.

    The folder is made when a fit begins or when there is something to write. That claims its number: another run that
    begins at the same time takes the next one. A folder in which nothing was written is removed. A resumed run goes on
    in the folder of the run that saved the checkpoint, if it has the same ``save_dir`` and ``name`` and was not given
    another ``version``. A relative ``save_dir`` is one of the folder in which the program is when it makes the logger.

    A disk that takes no rows, or a folder that is gone, ends no training: that is said once, and the rows are written
    as soon as it is possible again.

    Its arguments are described by the loggers that derive from it.

    Attributes:
        hparams: what was recorded by ``log_hyperparams``.

    Raises:
        TypeError: if ``version`` is neither an int nor a str.
    """

    LOGGER_JOIN_CHAR = "-"
    NAME_HPARAMS_FILE = "hparams.json"

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str | None,
        version: int | str | None,
        prefix: str,
        sub_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(version, bool) or not isinstance(version, (int, str, type(None))):
            raise TypeError(
                f"version must be a number, a folder's name or None; got {version!r}"
            )
        self._save_dir = os.path.expanduser(os.path.expandvars(os.fspath(save_dir)))
        self._working_folder = os.getcwd()
        self._name = name or ""
        self._given_version = version
        self._version = version
        self._prefix = f"{prefix}{self.LOGGER_JOIN_CHAR}" if prefix else ""
        self._sub_dir = "" if sub_dir is None else os.fspath(sub_dir)
        self.hparams: dict[str, Any] = {}
        self._hparams_written = True
        self._claimed = version is not None
        # The highest step logged.
        self._last_step = -1
        # Whether rows wait for a disk that does not take them.
        self._is_failing = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str:
        if self._version is None:
            self._version = next_version(self.root_dir)
        return self._version

    def claim(self) -> None:
        while not self._claimed:
            # Reading the property chooses a number.
            self.version  # noqa: B018
            if self._version is None:
                # A subclass names its runs itself.
                return
            self._claimed = make_folder(self._numbered_folder())
            if not self._claimed:
                # Another run was quicker.
                self._version = int(self._version) + 1

    def _numbered_folder(self) -> str:
        return os.path.join(self.root_dir, f"version_{self._version}")

    def _give_back(self) -> None:
        """Remove the folder if nothing is in it."""
        if self._given_version is None and self._claimed and is_local(self.root_dir):
            with suppress(OSError):
                os.rmdir(self._numbered_folder())
                self._claimed = False

    def finalize(self, status: str) -> None:
        self.save()
        if status == "success" and not self._hparams_written:
            self._write_hparams()
        self._give_back()

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def root_dir(self) -> str:
        """The folder of all versions."""
        folder = self.save_dir
        if is_local(folder) and os.getcwd() != self._working_folder:
            # The program has gone to another folder.
            folder = os.path.join(self._working_folder, folder)
        return os.path.join(folder, self.name) if self.name else folder

    @property
    def log_dir(self) -> str:
        version = self.version
        folder = version if isinstance(version, str) else f"version_{version}"
        return os.path.join(self.root_dir, folder, self._sub_dir).rstrip("/")

    def keep_aside(self, path: str) -> None:
        """Rename a file that another run left where this one's is to be."""
        if not exists(path):
            return
        root, extension = os.path.splitext(path)
        number = 1
        while exists(aside := f"{root}-{number}{extension}"):
            number += 1
        move = os.rename if is_local(path) else filesystem(path).mv
        move(path, aside)
        log.warning(
            "%s: %s is another run's, and is kept as %s",
            type(self).__name__,
            path,
            os.path.basename(aside),
        )

    def _attempt(self, write: Callable[[], None]) -> None:
        """Write rows; what cannot be written now waits on."""
        try:
            write()
        except OSError as error:
            if not self._is_failing:
                log.warning(
                    "%s cannot write its rows in %s (%s): training goes on, and they are written when it can",
                    type(self).__name__,
                    self.log_dir,
                    error,
                )
            self._is_failing = True
            return
        if self._is_failing:
            log.warning("%s can write again: no row is lost", type(self).__name__)
        self._is_failing = False

    def _note_step(self, step: int | None) -> int:
        """The step of a row, which by default is one more than the highest before; takes note of it."""
        step = self._last_step + 1 if step is None else step
        self._last_step = max(self._last_step, step)
        return step

    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Record hyperparameters in ``hparams.json``, which is written with the first row."""
        self.hparams.update(vars(params) if isinstance(params, Namespace) else params)
        self._hparams_written = False

    def _write_hparams(self) -> None:
        """Write ``hparams.json`` if it is not up to date."""
        self.claim()
        if self._hparams_written:
            return
        text = self.hparams_text(as_json(self.hparams))
        write_text(os.path.join(self.log_dir, self.NAME_HPARAMS_FILE), text)
        self._hparams_written = True

    def hparams_text(self, hparams: Any) -> str:
        """What the file of hyperparameters holds, of plain values; override it for another format."""
        return json.dumps(hparams, indent=2) + "\n"

    def state_dict(self) -> dict[str, Any]:
        return {"root_dir": absolute(self.root_dir), "version": self.version}

    def _continues(self, state_dict: dict[str, Any]) -> bool:
        """Whether to go on in the folder of the run that had this state; if so, that is the version from now on."""
        if state_dict.get("root_dir") != absolute(self.root_dir):
            return False
        if self._given_version not in (None, state_dict["version"]):
            return False
        self._version = state_dict["version"]
        self._claimed = True
        return True


def as_json(value: Any) -> Any:
    """A value as JSON can hold it: what it has no type for becomes its ``str``, keys of dicts too."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        # A service may take no other keys than texts.
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        # A number of NumPy's or torch's.
        value = value.item()
    return value if _is_plain(value) else str(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))


def flat(params: Mapping[Any, Any], path: str = "") -> list[tuple[str, Any]]:
    """The values in nested dicts, each with its path such as ``outer/inner``."""
    pairs: list[tuple[str, Any]] = []
    for name, value in params.items():
        if isinstance(value, Namespace):
            value = vars(value)
        if isinstance(value, Mapping):
            pairs += flat(value, f"{path}{name}/")
        else:
            pairs.append((f"{path}{name}", value))
    return pairs
