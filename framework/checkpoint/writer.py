"""Checkpoints on disk: a directory of tensors and JSON that is complete or does not count.

::

    epoch=3-step=400.ckpt/
      model/model.safetensors          parameters and buffers by name
      model/rank-0.safetensors, …      each rank's shards of tensors that are sharded
      model-ema/…                      other weights, such as their average, by name: one folder for each set
      optimizer/optimizer.safetensors  optimizer_states.<index>.state.<parameter>.<state>
      state.json, state.safetensors    counters, data cursor, schedulers, scaler, callbacks, hyperparameters
      rng/rank-0.json, .safetensors    random generators, one pair per rank
      objects.pkl                      what is neither tensor nor JSON, if anything
      manifest.json                    written last: sizes and checksums of all files, and facts about the run

A local checkpoint is written under a temporary name, flushed, and renamed. On an object store, and in a local directory
that holds something else, it is written in its place, the manifest last. So a directory with a valid manifest is a
whole checkpoint, and one without is none. What the manifest does not list is not ours, and is never touched.

Or a checkpoint is one file, as :mod:`.single_file` tells.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

from ...strategies.launch.failures import has_ended
from ...strategies.launch.rendezvous import comes
from ...strategies.pickling import dumps, script_name
from ...strategies.tensor_shards import TensorShard
from ..errors import OtherRankError
from .find import TAKEN_BACK, is_pointer
from .journal import (
    hidden_name,
    own_files,
    settle,
    settle_journals,
    sweep,
    write_journal,
)
from .manifest import FORMAT, MANIFEST, read_manifest, seal_manifest
from .serialization import State, encode, has_plain_value
from .storage import (
    is_local,
    join,
    remove_empty_folders,
    storage_of,
    sync_directory,
    top_of,
    without_local_scheme,
    write_file,
    writing,
)
from .tensors import StagedTensors, is_name, is_storable
from .zip_comment import ZIP

OBJECTS = "objects.pkl"
# Writes all files into the folder that it is given; returns size and checksum of each.
_Write = Callable[[str], State]


def weight_set_folder(name: str) -> str:
    """The folder in a checkpoint that holds the weights of this name."""
    return f"model-{name}"


class Snapshot:
    """A checkpoint's content, ready to be written: plain data.

    Args:
        checkpoint: ``state_dict``, ``optimizer_states`` and anything else, nested as users may nest it.
        facts: JSON values for the manifest.
        rng: each rank's random generators, by rank.
        copy: copy the tensors to the host's memory now, so that training may go on while they are written. Otherwise
            they must not change until that has been done.
        rank: of this process. All but the main one write their shards of tensors, and nothing else.

    Attributes:
        files: what this rank writes, by the files' names in the checkpoint.
    """

    def __init__(
        self,
        checkpoint: State,
        facts: State,
        rng: list[Any] | None,
        copy: bool,
        rank: int = 0,
    ) -> None:
        self.facts = facts
        self.copy = copy
        self.rank = rank
        self.files: dict[str, bytes | StagedTensors] = {}
        objects = {}
        rest = dict(checkpoint)
        weights = {}
        extra = {}
        for name, value in rest.pop("state_dict", {}).items():
            is_weight = is_storable(value) and is_name(name)
            (weights if is_weight else extra)[name] = value
        if extra:
            rest["model_extra_state"] = extra
        self._stage("model/model", weights)
        for name, other_weights in rest.pop("weight_sets", {}).items():
            self._stage(f"{weight_set_folder(name)}/model", other_weights)

        tensors = {}
        optimizer_tensors = {}
        encoded = {}
        for key, value in rest.items():
            into = optimizer_tensors if key == "optimizer_states" else tensors
            encoded[key] = encode(value, key, into, objects)
        if "optimizer_states" in rest:
            self._stage("optimizer/optimizer", optimizer_tensors)
        self._stage("state", tensors, encoded)
        if rank == 0:
            for number, generators in enumerate(rng or ()):
                tensors = {}
                encoded = encode(generators, "rng", tensors, objects)
                self._stage(f"rng/rank-{number}", tensors, encoded)
            pickled = pickle_objects(objects, f"kept in {OBJECTS}")
            if pickled is not None:
                self.files[OBJECTS] = pickled

    def _stage(
        self,
        name: str,
        tensors: State,
        encoded: Any = None,
    ) -> None:
        """Take tensors for files called ``name``, and JSON that goes with them."""
        whole = {}
        shards = {}
        for key, value in tensors.items():
            if not isinstance(value, TensorShard):
                whole[key] = value
            elif value.is_owner:
                shards[key] = value
        if shards:
            file = f"{top_of(name)}/rank-{self.rank}.safetensors"
            self.files[file] = StagedTensors(shards, self.copy)
        if self.rank == 0:
            self.files[f"{name}.safetensors"] = StagedTensors(whole, self.copy)
            if encoded is not None:
                self.files[f"{name}.json"] = json.dumps(encoded).encode()


def pickle_objects(objects: State, place: str) -> bytes | None:
    """Pickle each object by itself, so that one that cannot be pickled does not lose the others.

    Args:
        objects: by name.
        place: where they will be, for the line that names them.

    Returns:
        None if there are none.
    """
    pickled = {}
    needed = []
    for key, value in objects.items():
        try:
            pickled[key] = dumps(value)
        except Exception as error:
            # A user's object may raise anything, which must not lose the checkpoint.
            if not has_plain_value(value):
                print(
                    f"Checkpoint: {key} could not be pickled and is left out: {error}"
                )
        else:
            needed += () if has_plain_value(value) else (key,)
    if needed:
        print(f"Checkpoint: {', '.join(needed)}: neither tensors nor JSON, {place}")
    return pickle.dumps((script_name(), pickled)) if pickled else None


class ShardedCommit:
    """Lets ranks that each write their shards hear of each other while the training goes on.

    The threads that write use the store through which the ranks met, as a collective would mix with the training's.

    Args:
        strategy: one whose ranks have met.
    """

    def __init__(self, strategy: Any) -> None:
        self.rank = strategy.global_rank
        self.world_size = strategy.world_size
        self.store = strategy.group.store("checkpoint")

    def lead(
        self,
        snapshot: Snapshot,
        target: str,
    ) -> State:
        """On the main rank: let all write into the folder ``target``; returns size and checksum of each file.

        Raises:
            Exception: what went wrong here.
            OtherRankError: if it went well here, but not on another one; when all are done.
        """
        self._tell(target)
        failed: Exception | None = None
        files = {}
        for rank in range(self.world_size):
            try:
                if rank == self.rank:
                    files |= _write_files(snapshot, target)
                else:
                    files |= self._answer(rank)
            except Exception as error:
                # The others still write there.
                failed = failed or error
        if failed is not None:
            raise failed
        return files

    def follow(self, snapshot: Snapshot) -> None:
        """On the others: write this rank's files, and tell the main one which they are, or what went wrong."""
        try:
            files = _write_files(snapshot, self._answer(0))
        except Exception as error:
            self.give_up(error)
            raise
        self._tell(files)

    def give_up(self, error: Exception) -> None:
        """Tell those who wait for this rank that it failed."""
        why = f"{type(error).__name__}: {error}"
        self._tell(None, f"rank {self.rank} could not save its part: {why}")

    def _tell(
        self,
        value: Any,
        failure: str = "",
    ) -> None:
        self.store.set(str(self.rank), json.dumps([value, failure]))

    def _answer(self, rank: int) -> Any:
        """Return what a rank tells: the main one where to write, another one what it has written."""
        key = str(rank)
        if not comes(self.store, key, partial(has_ended, rank)):
            raise OtherRankError(
                f"rank {rank} could not save its part: it hung, or had ended"
            )
        value, failure = json.loads(self.store.get(key))
        if failure:
            raise OtherRankError(failure)
        return value


def save_checkpoint(
    checkpoint: State, path: str, facts: State, rng: list[Any] | None
) -> None:
    """Write a checkpoint; arguments as of :class:`Snapshot` and :func:`commit`."""
    commit(Snapshot(checkpoint, facts, rng, copy=False), os.fspath(path))


def commit(
    snapshot: Snapshot,
    path: str,
    shared: ShardedCommit | None = None,
) -> None:
    """Write the directory ``path``; when this returns, it is complete and on disk.

    Args:
        snapshot: what to write.
        path: the directory, local or any fsspec URL.
        shared: if all ranks write. On all but the main one, this returns when their own files are written.

    Raises:
        OSError: naming ``path``, if that failed; what was there before is untouched.
    """
    path = without_local_scheme(path).rstrip("/")
    with _naming(f"checkpoint {path!r}"):
        if shared is None:
            _commit(snapshot, path, partial(_write_files, snapshot))
        elif snapshot.rank:
            shared.follow(snapshot)
        else:
            try:
                _commit(snapshot, path, partial(shared.lead, snapshot))
            except Exception as error:
                shared.give_up(error)
                raise


def commit_file(write: Callable[[Any], None], path: str) -> None:
    """Write a checkpoint in one file, which appears all at once; when this returns, it is on disk.

    Args:
        write: writes it to an open file.
        path: of the file, local or any fsspec URL. A checkpoint that is there is replaced.

    Raises:
        OSError: naming ``path``, if that failed; what was there before is untouched.
    """
    path = without_local_scheme(path)
    with _naming(f"checkpoint {path!r}"):
        path = _target(path, _is_archive_or_empty)
        if not is_local(path):
            with writing(path) as file:
                write(file)
            return
        is_folder = os.path.isdir(path)
        if is_folder and not _is_all_ours(path):
            raise FileExistsError(
                "a folder is there that is no checkpoint, or holds other files; save elsewhere"
            )
        parent = os.path.dirname(path) or "."
        os.makedirs(parent, exist_ok=True)
        sweep(parent)
        temporary = hidden_name(path, "tmp")
        try:
            with writing(temporary) as file:
                write(file)
            if is_folder:
                _move_into_place(temporary, path, replaces=True)
            else:
                os.replace(temporary, path)
                sync_directory(parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def _target(path: str, is_replaceable: Callable[[str], Any]) -> str:
    """Where to write a checkpoint, for a path that may be a link to there.

    Args:
        path: as it was given.
        is_replaceable: whether a file that is there, and no pointer, may be replaced.

    Raises:
        FileExistsError: if it may not.
    """
    storage = storage_of(path)
    if storage.is_file(path) and not (is_pointer(path) or is_replaceable(path)):
        raise FileExistsError(
            "a file is there that is no checkpoint; remove it, or save elsewhere"
        )
    if storage.is_local and os.path.islink(path):
        # The link stays, and what it leads to is replaced.
        return os.path.realpath(path)
    return path


def _is_archive_or_empty(path: str) -> bool:
    """Whether a file is one of ``torch.save``, be it another program's; of an empty one, only the name is reserved."""
    storage = storage_of(path)
    return not storage.size(path) or storage.read(path, len(ZIP)) == ZIP


def _commit(
    snapshot: Snapshot,
    path: str,
    write: _Write,
) -> None:
    path = _target(path, own_files)
    storage = storage_of(path)
    if storage.is_local and (not os.path.isdir(path) or _is_all_ours(path)):
        _write_beside(snapshot, path, write)
    else:
        _write_in_place(snapshot, path, write)


def _write_beside(
    snapshot: Snapshot,
    path: str,
    write: _Write,
) -> None:
    """Write a local checkpoint under another name, and give it its own when it is complete."""
    parent = os.path.dirname(path) or "."
    os.makedirs(parent, exist_ok=True)
    sweep(parent)
    # Only what is there now: another run may put a checkpoint there meanwhile, which must stay.
    replaces = os.path.lexists(path)
    temporary = hidden_name(path, "tmp")
    try:
        files = write(temporary)
        write_file(join(temporary, MANIFEST), _manifest(snapshot, files))
        for directory, _, _ in os.walk(temporary):
            sync_directory(directory)
        _move_into_place(temporary, path, replaces)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _move_into_place(
    temporary: str,
    path: str,
    replaces: bool,
) -> None:
    """Rename a folder; the one that it replaces is moved aside for as long as that takes."""
    aside = None
    if replaces and os.path.lexists(path):
        aside = hidden_name(path, "old")
        os.rename(path, aside)
    try:
        # Fails if another run has put a checkpoint there meanwhile.
        os.rename(temporary, path)
    except BaseException:
        if aside is not None:
            os.rename(aside, path)
        raise
    sync_directory(os.path.dirname(path) or ".")
    if aside is not None:
        storage_of(aside).remove(aside)


def _write_in_place(
    snapshot: Snapshot,
    path: str,
    write: _Write,
) -> None:
    """Write a checkpoint where a folder of other files, or another checkpoint of a store, may be.

    The manifest, one small file that comes last, is what makes the others count. Until then, a journal lists them, so
    that whoever saves here after an interruption can tell them from files that are not ours. Where a name is taken,
    by the checkpoint before or by a file of the user's, all go into a folder of their own that the manifest names.
    """
    storage = storage_of(path)
    settle_journals(path)
    if storage.is_file(path):
        # A pointer at a store.
        storage.remove(path)
    before = own_files(path)
    names = _possible_files(snapshot)
    folder = _free_folder(path, before, names)
    target = join(path, folder) if folder else path
    journal = write_journal(
        path,
        [*before, *(f"{folder}/{name}".lstrip("/") for name in names)],
    )
    try:
        files = write(target)
    except BaseException:
        # The store may be out of reach: the next save here will settle it.
        with suppress(Exception):
            settle(path, journal)
        raise
    if storage.is_local:
        written = [os.path.dirname(join(target, name)) for name in files]
        for directory in {path, target, *written}:
            sync_directory(directory)
    # If this fails, nobody knows whether it has arrived, or will: the files that it names must stay.
    write_file(join(path, MANIFEST), _manifest(snapshot, files, folder))
    settle(path, journal)


def _possible_files(snapshot: Snapshot) -> list[str]:
    """All files that may be written, by other ranks too."""
    names = [*snapshot.files]
    for group in ("model", "optimizer", "state"):
        for rank in range(snapshot.facts.get("world_size", 1)):
            names.append(f"{group}/rank-{rank}.safetensors")
    return names


def _free_folder(
    path: str,
    before: list[str],
    names: list[str],
) -> str:
    """The folder inside of ``path`` for a checkpoint's files, "" for ``path`` itself.

    Args:
        path: the folder.
        before: the files of the checkpoint that is there.
        names: those of the new one.

    Raises:
        FileExistsError: if something else has the manifest's name.
    """
    storage = storage_of(path)
    # A store lists files only.
    there = storage.names(path) if storage.is_local else storage.files(path)
    taken = {top_of(name) for name in there}
    if MANIFEST in taken and not before:
        raise FileExistsError(
            f"{MANIFEST} is there, and not that of a checkpoint; remove it, or save elsewhere"
        )
    if not before and taken.isdisjoint(map(top_of, names)):
        return ""
    return uuid.uuid4().hex[:8]


def _write_files(snapshot: Snapshot, target: str) -> State:
    """Write this rank's files into a folder; returns size and checksum of each."""
    files = {}
    for name, content in snapshot.files.items():
        is_staged = isinstance(content, StagedTensors)
        size = crc32 = 0
        with writing(join(target, *name.split("/"))) as file:
            for chunk in content.chunks() if is_staged else [content]:
                file.write(chunk)
                size += len(chunk)
                crc32 = zlib.crc32(chunk, crc32)
        files[name] = {"size": size, "crc32": crc32}
    return files


def _manifest(
    snapshot: Snapshot,
    files: State,
    folder: str = "",
) -> bytes:
    body = {"format": FORMAT, "torch": torch.__version__, "files": files}
    if folder:
        body["folder"] = folder
    return seal_manifest({**body, **snapshot.facts})


def remove_checkpoint(path: str, root: str | None = None) -> None:
    """Delete a checkpoint, or a pointer.

    What an interruption leaves of it counts as no checkpoint, and is removed by the next save.

    Args:
        path: a pointer, or the directory of a checkpoint; files there that are not the checkpoint's stay.
        root: the folders between this one and the checkpoint go, too, where that leaves them empty.

    Raises:
        CheckpointError: if the directory holds no checkpoint.
    """
    storage = storage_of(path)
    if storage.is_file(path):
        storage.remove(path)
    elif _is_all_ours(path):
        unfinished = hidden_name(path, "tmp")
        os.rename(path, unfinished)
        storage.remove(unfinished)
    elif files := own_files(path):
        journal = write_journal(path, files)
        storage.remove(join(path, MANIFEST))
        settle(path, journal)
        remove_empty_folders(path, os.path.dirname(path))
    elif storage.exists(path):
        # Raises, and says why this is no checkpoint.
        read_manifest(path)
    if root is not None:
        remove_empty_folders(path.rpartition("/")[0], root)


def set_aside(path: str) -> str:
    """Rename a checkpoint to ``*.taken-back``, under which nobody looks for one; returns the new path."""
    storage = storage_of(path)
    aside = f"{path}{TAKEN_BACK}"
    number = 1
    while storage.exists(aside):
        number += 1
        aside = f"{path}.{number}{TAKEN_BACK}"
    storage.move(path, aside)
    return aside


def _is_all_ours(path: str) -> bool:
    """Whether a local folder holds a checkpoint and nothing else, and another can take its place."""
    if not _can_move(path):
        return False
    ours = {*own_files(path)}
    if not ours:
        return False
    storage = storage_of(path)
    tops = {top_of(name) for name in ours}
    # The names at the top first, as there may be very many files below.
    return tops.issuperset(storage.names(path)) and ours.issuperset(storage.files(path))


def _can_move(path: str) -> bool:
    """Whether a folder can be renamed: it is local, no link, no disk, not where this program works, ours to move."""
    if not is_local(path) or os.path.islink(path) or os.path.ismount(path):
        return False
    real = os.path.realpath(path)
    working_directory = ""
    # Somebody may have removed the working directory.
    with suppress(FileNotFoundError):
        working_directory = os.getcwd()
    is_around_us = join(working_directory, "").startswith(join(real, ""))
    return not is_around_us and os.access(os.path.dirname(real), os.W_OK)


def write_pointer(path: str, target: str) -> None:
    """Make ``path`` name the checkpoint ``target``, all at once: a small file, or a link to a local file.

    The link is for other programs, which can open it.
    """
    target = target.rstrip("/")
    is_file = is_local(path) and os.path.isfile(target)
    if os.path.dirname(path) == os.path.dirname(target):
        # By its name alone, so that the folder of both can be moved.
        target = os.path.basename(target)
    content = json.dumps({"checkpoint": target}).encode()
    with _naming(f"pointer {path!r}"):
        if not is_local(path):
            write_file(path, content)
            return
        # Under a name by which the next save finds, and removes, what one that was killed has left.
        temporary = hidden_name(path, "tmp")
        if not (is_file and _link(temporary, target)):
            write_file(temporary, content)
        os.replace(temporary, path)
        sync_directory(os.path.dirname(path) or ".")


def _link(path: str, target: str) -> bool:
    """Make ``path`` a link to ``target``; False if the file system has no links."""
    try:
        os.symlink(target, path)
    except OSError:
        return False
    return True


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turn whatever the block raises, as file systems may raise anything, into an OSError that says what failed."""
    try:
        yield
    except OtherRankError:
        # It is named by the rank that knows what has failed.
        raise
    except Exception as error:
        number = getattr(error, "errno", None)
        has_number = isinstance(number, int)
        why = f"{type(error).__name__}: {error}"
        if has_number and getattr(error, "strerror", None) == os.strerror(number):
            why = os.strerror(number)
        message = f"{what} could not be written: {why}"
        arguments = (number, message) if has_number else (message,)
        raise OSError(*arguments) from error
