"""What the loggers that write files share: a numbered folder for each run, and its hyperparameters."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from .base import Logger


class FolderLogger(Logger):
    """The base of loggers that keep each run in a folder, ``save_dir/name/version_N``.

    The folder is made when a fit begins or when there is something to write, and makes its number this run's: another
    run that begins at the same time takes the next one. If nothing was written, it goes. A resumed run goes on in
    the folder of the run that saved the checkpoint, if it has the same ``save_dir`` and ``name`` and was not given
    another ``version``.

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
        if version is not None and (
            isinstance(version, bool) or not isinstance(version, (int, str))
        ):
            raise TypeError(
                f"version must be a number, a folder's name or None; got {version!r}"
            )
        self._save_dir = os.path.expanduser(os.path.expandvars(os.fspath(save_dir)))
        self._name = name or ""
        self._given_version = version
        self._version = version
        self._prefix = f"{prefix}{self.LOGGER_JOIN_CHAR}" if prefix else ""
        self._sub_dir = "" if sub_dir is None else os.fspath(sub_dir)
        self.hparams: dict[str, Any] = {}
        self._hparams_written = True
        self._claimed = version is not None

    # -- places -----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str:
        if self._version is None:
            self._version = _next_version(self.root_dir)
        return self._version

    def claim(self) -> None:
        while not self._claimed:
            self.version  # noqa: B018 # asking chooses a number
            if self._version is None:  # a subclass names its runs itself
                return
            self._claimed = _make_folder(self._numbered_folder())
            if not self._claimed:
                self._version = int(self._version) + 1  # another run was quicker

    def _numbered_folder(self) -> str:
        return os.path.join(self.root_dir, f"version_{self._version}")

    def _give_back(self) -> None:
        """Remove the folder if nothing is in it."""
        if self._given_version is None and self._claimed and is_local(self.root_dir):
            with suppress(OSError):
                os.rmdir(self._numbered_folder())
                self._claimed = False

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def root_dir(self) -> str:
        """The folder of all versions."""
        return os.path.join(self.save_dir, self.name) if self.name else self.save_dir

    @property
    def log_dir(self) -> str:
        version = (
            self.version if isinstance(self.version, str) else f"version_{self.version}"
        )
        return os.path.join(self.root_dir, version, self._sub_dir).rstrip("/")

    # -- hyperparameters --------------------------------------------------------------------------------------

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Record hyperparameters in ``hparams.json``, which is written with the first row."""
        self.hparams.update(vars(params) if isinstance(params, Namespace) else params)
        self._hparams_written = False

    def _write_hparams(self) -> None:
        """Write ``hparams.json`` if it is not up to date; what is no JSON goes in as its ``str``."""
        self.claim()
        if self._hparams_written:
            return
        text = json.dumps(_plain(self.hparams), indent=2) + "\n"
        write_text(os.path.join(self.log_dir, self.NAME_HPARAMS_FILE), text)
        self._hparams_written = True

    # -- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"root_dir": _absolute(self.root_dir), "version": self.version}

    def _takes_up(self, state_dict: dict[str, Any]) -> bool:
        """Whether to go on in the folder of the run that had this state; if so, that is the version from now on."""
        same_place = state_dict.get("root_dir") == _absolute(self.root_dir)
        if not same_place or self._given_version not in (None, state_dict["version"]):
            return False
        self._version = state_dict["version"]
        self._claimed = True
        return True


def is_local(path: str) -> bool:
    """Whether ``path`` is no URL of another file system."""
    return "://" not in path


def filesystem(path: str) -> Any:
    """The fsspec file system of a path or URL."""
    import fsspec

    # Its listings are not kept: another run's folder would not be seen in them.
    return fsspec.core.url_to_fs(path, use_listings_cache=False)[0]


def write_text(path: str, text: str) -> None:
    """Write a whole file; a local one is replaced at once, so that an interruption loses nothing."""
    if not is_local(path):
        filesystem(path).pipe_file(path, text.encode())
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.tmp", "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


def _make_folder(path: str) -> bool:
    """Make a folder that nobody has made before; False if it is there."""
    try:
        if is_local(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            os.mkdir(path)
        else:
            _put_once(filesystem(path), f"{path}/.claimed")
    except FileExistsError:
        return False
    return True


def _put_once(store: Any, path: str) -> None:
    """Put a file where there is none, as a store has no folders."""
    try:
        store.pipe_file(path, b"1", mode="create")
    except FileExistsError:
        raise
    except (
        Exception
    ):  # not every store can do so; then two runs of one moment are not told apart
        if store.exists(path):
            raise FileExistsError(path) from None
        store.pipe_file(path, b"1")


def _absolute(path: str) -> str:
    return os.path.realpath(path) if is_local(path) else path


def _next_version(root: str) -> int:
    """One more than the highest ``N`` of the ``version_N`` in ``root``; 0 if there is none."""
    try:
        names = (
            os.listdir(root)
            if is_local(root)
            else filesystem(root).ls(root, detail=False)
        )
    except FileNotFoundError:
        return 0
    versions = [os.path.basename(name.rstrip("/")).split("version_") for name in names]
    numbers = [
        int(parts[1])
        for parts in versions
        if len(parts) == 2 and not parts[0] and parts[1].isdecimal()
    ]
    return max(numbers, default=-1) + 1


def _plain(value: Any) -> Any:
    """``value`` in what JSON has; all else as its ``str``, keys of dicts too."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {
            key if _is_plain(key) else str(key): _plain(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return list(map(_plain, value))
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return value if _is_plain(value) else str(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))
