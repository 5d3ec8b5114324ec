"""Checkpoints on disk: a directory of tensors and JSON that is complete or does not count.

::

    epoch=3-step=400.ckpt/
      model/model.safetensors          parameters and buffers by name
      model/rank-0.safetensors, …      of those that are spread over processes, what each of these has
      optimizer/optimizer.safetensors  optimizer_states.<index>.state.<parameter>.<state>
      state.json, state.safetensors    counters, data cursor, schedulers, scaler, callbacks, hyperparameters
      rng/rank-0.json, .safetensors    random generators, one pair per process
      objects.pkl                      what is neither tensor nor JSON, if anything
      manifest.json                    written last: sizes and checksums of all files, and facts about the run

A local checkpoint is written under a temporary name, flushed, and renamed. On an object store, and in a local directory
that holds something else, it is written in its place, the manifest last. So a directory with a valid manifest is a
whole checkpoint, and one without is none. What the manifest does not list is not ours, and is never touched.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...strategies.tensor_shards import TensorShard
from .find import pointed_to
from .journal import (
    hidden_name,
    own_files,
    settle,
    settle_journals,
    sweep,
    write_journal,
)
from .manifest import FORMAT, MANIFEST, path_of, read_manifest, seal_manifest
from .serialization import encode, has_plain
from .storage import (
    exists,
    is_file,
    is_local,
    join,
    list_files,
    list_names,
    plain,
    remove,
    remove_empty_folders,
    sync_directory,
    write_file,
    writing,
)
from .tensors import StagedTensors, is_name, is_plain

if TYPE_CHECKING:
    from .saver import Peers


# -- finding ---------------------------------------------------------------------------------------------------------


def remove_checkpoint(path: str, root: str | None = None) -> None:
    """Delete a checkpoint, or a pointer; what an interruption leaves is no checkpoint, and goes with the next save.

    Args:
        path: a pointer, or the directory of a checkpoint; files there that are not the checkpoint's stay.
        root: the folders between this one and the checkpoint go, too, where that leaves them empty.

    Raises:
        CheckpointError: if the directory holds no checkpoint.
    """
    if is_file(path):
        remove(path)
    elif _is_all_ours(path):
        unfinished = hidden_name(path, "tmp")
        os.rename(path, unfinished)
        remove(unfinished)
    elif own := own_files(path):
        journal = write_journal(path, own)
        remove(join(path, MANIFEST))
        settle(path, journal)
        remove_empty_folders(path, os.path.dirname(path))
    elif exists(path):
        read_manifest(path)
    if root is not None:
        remove_empty_folders(path.rpartition("/")[0], root)


def write_pointer(path: str, target: str) -> None:
    """Write the small file ``path`` that names the checkpoint ``target``, all at once."""
    relative = os.path.dirname(path) == os.path.dirname(target.rstrip("/"))
    content = json.dumps(
        {"checkpoint": os.path.basename(target.rstrip("/")) if relative else target}
    ).encode()
    with _naming(f"pointer {path!r}"):
        write_file(path, content)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Raise whatever a file system raises as an OSError that says what could not be written."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        plain = isinstance(number, int) and getattr(
            error, "strerror", None
        ) == os.strerror(number)
        why = os.strerror(number or 0) if plain else f"{type(error).__name__}: {error}"
        message = f"{what} could not be written: {why}"
        raise (
            OSError(number, message) if isinstance(number, int) else OSError(message)
        ) from error


# -- writing --------------------------------------------------------------------------------------------------------


class Snapshot:
    """A checkpoint's content, ready to be written.

    Args:
        checkpoint: ``state_dict``, ``optimizer_states`` and anything else, nested as users may nest it.
        facts: JSON values for the manifest.
        rng: each process's random generators, by rank.
        copy: copy the tensors to the host's memory now, so that training may go on while they are written. Otherwise
            they must not change until that has been done.
        rank: of this process. All but the main one write their pieces of tensors, and nothing else.
    """

    def __init__(
        self,
        checkpoint: dict[str, Any],
        facts: dict[str, Any],
        rng: list[Any] | None,
        copy: bool,
        rank: int = 0,
    ) -> None:
        self.facts, self.copy, self.rank = facts, copy, rank
        self.files: dict[str, bytes | StagedTensors] = {}
        objects: dict[str, Any] = {}
        rest = dict(checkpoint)
        model = rest.pop("state_dict", {})
        if extra := {
            name: value
            for name, value in model.items()
            if not (is_plain(value) and is_name(name))
        }:
            rest["model_extra_state"] = extra
        model = {name: value for name, value in model.items() if name not in extra}
        self._stage("model/model", model)

        tensors: dict[str, Tensor] = {}
        optimizer_tensors: dict[str, Tensor] = {}
        encoded = {
            key: encode(
                value,
                key,
                optimizer_tensors if key == "optimizer_states" else tensors,
                objects,
            )
            for key, value in rest.items()
        }
        if "optimizer_states" in rest:
            self._stage("optimizer/optimizer", optimizer_tensors)
        self._stage("state", tensors, encoded)
        if rank:
            return
        for number, generators in enumerate(rng or ()):
            tensors = {}
            encoded = encode(generators, "rng", tensors, objects)
            self._stage(f"rng/rank-{number}", tensors, encoded)
        if objects:
            _pickle_objects(objects, self.files)

    def _stage(self, name: str, tensors: dict[str, Any], encoded: Any = None) -> None:
        """Take tensors for files called ``name``, and JSON that goes with them."""
        pieces = {
            key: value
            for key, value in tensors.items()
            if isinstance(value, TensorShard)
        }
        if own := {key: piece for key, piece in pieces.items() if piece.is_owner}:
            self.files[f"{name.partition('/')[0]}/rank-{self.rank}.safetensors"] = (
                StagedTensors(own, self.copy)
            )
        if self.rank == 0:
            whole = {key: value for key, value in tensors.items() if key not in pieces}
            self.files[f"{name}.safetensors"] = StagedTensors(whole, self.copy)
            if encoded is not None:
                self.files[f"{name}.json"] = json.dumps(encoded).encode()

    def write(self, path: str, peers: Peers | None = None) -> None:
        """Write the directory ``path``; when this returns, it is complete and on disk.

        Args:
            path: the directory, local or any fsspec URL.
            peers: if other processes write parts of it: how they hear of each other. In these, what returns is that
                this part is there.

        Raises:
            OSError: naming ``path``, if that failed; what was there before is untouched.
        """
        path = plain(path).rstrip("/")
        with _naming(f"checkpoint {path!r}"):
            if peers is not None and self.rank:
                peers.hand_in(lambda: self._write_own(peers.target()))
                return
            self.peers = peers
            try:
                _commit(self, path)
            except Exception as error:
                if peers is not None:
                    peers.give_up(error)
                raise

    def write_files(self, target: str, about: dict[str, Any]) -> dict[str, Any]:
        """Write all files into the folder ``target``; returns what the manifest is to hold."""
        files = (
            self._write_own(target)
            if self.peers is None
            else self.peers.gather(target, self._write_own)
        )
        return {
            "format": FORMAT,
            "torch": torch.__version__,
            "files": files,
            **about,
            **self.facts,
        }

    def file_names(self) -> list[str]:
        """All that may be written, by other processes too."""
        ranks = range(1 if self.peers is None else self.peers.world_size)
        groups = ("model", "optimizer", "state")
        return [
            *self.files,
            *(f"{group}/rank-{rank}.safetensors" for group in groups for rank in ranks),
        ]

    def _write_own(self, target: str) -> dict[str, Any]:
        files: dict[str, Any] = {}
        for name, content in self.files.items():
            with writing(join(target, *name.split("/"))) as file:
                sum_ = _Checksum(file)
                content.write(sum_) if isinstance(
                    content, StagedTensors
                ) else sum_.write(content)
            files[name] = {"size": sum_.size, "crc32": sum_.crc32}
        return files


def save_checkpoint(
    checkpoint: dict[str, Any], path: str, facts: dict[str, Any], rng: list[Any] | None
) -> None:
    """Write a checkpoint; arguments as of :class:`Snapshot`, whose :meth:`~Snapshot.write` this calls."""
    Snapshot(checkpoint, facts, rng, copy=False).write(os.fspath(path))


def _commit(snapshot: Snapshot, path: str) -> None:
    if is_file(path) and pointed_to(path) is None:
        raise FileExistsError(
            "a file is there that is no checkpoint; remove it, or save elsewhere"
        )
    if is_local(path) and os.path.islink(path):
        path = os.path.realpath(path)  # it stays one
    if is_local(path) and (not os.path.isdir(path) or _is_all_ours(path)):
        _write_beside(snapshot, path)
    else:
        _write_in_place(snapshot, path)


def _write_beside(snapshot: Snapshot, path: str) -> None:
    """Write a local checkpoint under another name, and give it its own when it is complete."""
    parent = os.path.dirname(path)
    os.makedirs(parent or ".", exist_ok=True)
    sweep(parent or ".")
    replaces = os.path.lexists(path)
    temporary = hidden_name(path, "tmp")
    try:
        write_file(
            join(temporary, MANIFEST),
            seal_manifest(snapshot.write_files(temporary, {})),
        )
        _move_into_place(temporary, path, replaces)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_in_place(snapshot: Snapshot, path: str) -> None:
    """Write a checkpoint where a folder of other files, or another checkpoint of a store, may be.

    The manifest, one small file that comes last, is what makes the others count. Until then, a journal lists them, so
    that whoever saves here after an interruption can tell them from files that are not ours. Where a name is taken,
    by the checkpoint before or by a file of the user's, all go into a folder of their own that the manifest names.
    """
    settle_journals(path)
    if is_file(path):
        remove(path)  # a pointer at a store
    there = (
        {*list_names(path)}
        if is_local(path)
        else {name.partition("/")[0] for name in list_files(path)}
    )
    before = own_files(path)
    if MANIFEST in there and not before:
        raise FileExistsError(
            f"{MANIFEST} is there, and not that of a checkpoint; remove it, or save elsewhere"
        )
    names = snapshot.file_names()
    is_free = not before and there.isdisjoint(name.partition("/")[0] for name in names)
    folder = "" if is_free else uuid.uuid4().hex[:8]
    journal = write_journal(
        path, [*before, *(f"{folder}/{name}".lstrip("/") for name in names)]
    )
    target = join(path, folder) if folder else path
    try:
        manifest = snapshot.write_files(target, {"folder": folder} if folder else {})
    except BaseException:
        with suppress(Exception):  # the store may be out of reach
            settle(path, journal)
        raise
    if is_local(path):
        for own in {
            path,
            target,
            *(
                os.path.dirname(path_of(path, name, manifest))
                for name in manifest["files"]
            ),
        }:
            sync_directory(own)
    # If this fails, nobody knows whether it has arrived, or will: the files that it names must stay.
    write_file(join(path, MANIFEST), seal_manifest(manifest))
    settle(path, journal)


def _is_all_ours(path: str) -> bool:
    """Whether a local folder holds a checkpoint and nothing else, and another can take its place."""
    if not _can_move(path) or not (own := {*own_files(path)}):
        return False
    return {name.partition("/")[0] for name in own}.issuperset(
        list_names(path)
    ) and own.issuperset(list_files(path))


def _can_move(path: str) -> bool:
    """Whether a folder can be renamed: it is local, no link, no disk, not where this program works, ours to move."""
    if not is_local(path) or os.path.islink(path) or os.path.ismount(path):
        return False
    here, real = "", os.path.realpath(path)
    with suppress(FileNotFoundError):  # somebody has removed where we are
        here = os.getcwd()
    return os.access(os.path.dirname(real), os.W_OK) and not join(here, "").startswith(
        join(real, "")
    )


def _sync_directories(path: str) -> None:
    for directory, _, _ in os.walk(path):
        sync_directory(directory)


def _move_into_place(temporary: str, path: str, replaces: bool) -> None:
    _sync_directories(temporary)
    replaced = None
    if replaces and os.path.lexists(path):
        replaced = hidden_name(path, "old")
        os.rename(path, replaced)
    try:
        os.rename(
            temporary, path
        )  # fails if another run has put a checkpoint there meanwhile
    except BaseException:
        if replaced is not None:
            os.rename(replaced, path)
        raise
    sync_directory(os.path.dirname(path) or ".")
    if replaced is not None:
        remove(replaced)


def _pickle_objects(objects: dict[str, Any], files: dict[str, Any]) -> None:
    """Pickle each object by itself, so that one that cannot be pickled does not lose the others."""
    from ...strategies.pickling import dumps, script_name

    pickled: dict[str, bytes] = {}
    for key, value in objects.items():
        try:
            pickled[key] = dumps(value)
        except (
            Exception
        ) as error:  # whatever a user's object raises must not lose the checkpoint
            if not has_plain(value):
                print(
                    f"Checkpoint: {key} could not be pickled and is left out: {error}"
                )
    if pickled:
        files["objects.pkl"] = pickle.dumps((script_name(), pickled))
    if needed := [key for key in pickled if not has_plain(objects[key])]:
        print(
            f"Checkpoint: {', '.join(needed)}: neither tensors nor JSON, kept in objects.pkl"
        )


class _Checksum:
    """Passes on what is written to ``file``, and takes its size and checksum."""

    def __init__(self, file: Any) -> None:
        self.file, self.size, self.crc32 = file, 0, 0

    def write(self, content: Any) -> None:
        self.file.write(content)
        self.size += len(content)
        self.crc32 = zlib.crc32(content, self.crc32)


# -- reading --------------------------------------------------------------------------------------------------------
