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

import fnmatch
import json
import os
import pickle
import re
import shutil
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...strategies.pieces import Piece
from .serialization import SealedObject, decode, encode, has_plain
from .storage import (
    exists,
    find_folders_with,
    is_file,
    is_local,
    join,
    list_files,
    list_names,
    plain,
    read_bytes,
    remove,
    remove_empty_folders,
    remove_files,
    size,
    sync_directory,
    write_file,
    writing,
)
from .tensors import StagedTensors, is_name, is_plain, join_pieces, read_tensors
from .weights import is_weights_file, load_weights_file

if TYPE_CHECKING:
    from .saver import Peers

FORMAT = 1
MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 2**28  # bytes; a file that is larger was made to fill the memory
# What is there for a while only: the name that it is for, and the process that made it; the last part is replacing's.
_UNFINISHED = re.compile(
    r"\.(?P<name>.+)\.(?P<place>[^.]+-\d+)-(?P<process>\d+)\.[0-9a-f]{8}\.(tmp|old)(\.[0-9a-f]{8}\.tmp)?", re.DOTALL
)
_FORGOTTEN = 7 * 86400.0  # seconds after which what another machine has not finished is taken for abandoned


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used as asked; the message names it, what is wrong and the way out."""


# -- finding ---------------------------------------------------------------------------------------------------------


def _replaced(path: str) -> str | None:
    """The complete checkpoint that was moved aside, if the process was killed before the new one took its place."""
    parent, name = os.path.split(path.rstrip("/"))
    if not os.path.isdir(parent or "."):
        return None
    aside = [other for other in os.listdir(parent or ".") if other.startswith(f".{name}.") and other.endswith(".old")]
    return next((found for other in aside if is_complete(found := os.path.join(parent, other))), None)


def resolve(path: str) -> str:
    """The checkpoint, a directory or a file of weights, that ``path`` is or points to.

    Raises:
        CheckpointError: if there is none.
    """
    path = plain(os.fspath(path))
    if not exists(path) and is_local(path) and (replaced := _replaced(path)) is not None:
        return replaced
    if not exists(path):
        raise CheckpointError(f"there is no checkpoint at {path!r}")
    if not is_file(path):
        return path.rstrip("/")
    if is_weights_file(path):
        return path
    target = _pointed(path)
    if target is None:
        raise CheckpointError(
            f"{path!r} is neither a checkpoint directory, nor a pointer to one, nor a file of weights (damaged?)"
        )
    target = target if os.path.isabs(target) or "://" in target else join(os.path.dirname(path), target)
    if not exists(target) and is_local(target):
        return _replaced(target) or target
    return target


def _pointed(path: str) -> str | None:
    """What the pointer ``path`` names; None if it is another file."""
    try:
        target = json.loads(read_bytes(path, limit=1 << 16))["checkpoint"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return target if isinstance(target, str) else None


def find_manifests(directory: str, damaged: Callable[[str], Any] = lambda _: None) -> dict[str, dict[str, Any]]:
    """The manifests of the complete checkpoints in a directory and its folders, by path.

    ``damaged`` is told of each that has no valid manifest; of other damage, only reading them tells.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in (folders := set(find_folders_with(directory, (MANIFEST, "state.json")))):
        parent, name = path.rpartition("/")[::2]
        if parent in folders and not exists(join(path, MANIFEST)):
            continue  # where the files of one are that has replaced another
        # One moved aside counts only while nothing has taken its place.
        if name.startswith(".") and (not name.endswith(".old") or exists(join(parent, _own_name(name)))):
            continue
        try:
            found[path] = read_manifest(path)
        except CheckpointError as error:
            damaged(str(error))
        except OSError as error:
            if not is_local(path):
                raise  # a store that does not answer now is not one without checkpoints
            damaged(f"checkpoint {path!r} cannot be read: {error}")
    return found


def find_checkpoints(directory: str) -> list[str]:
    """The complete checkpoints in a directory and its folders, the one written last first."""
    found = find_manifests(directory)
    return sorted(found, key=lambda path: (found[path].get("created", 0.0), path), reverse=True)


def is_taken(path: str) -> bool:
    """Whether there is something at ``path`` that a new checkpoint must not take the place of unasked."""
    if is_local(path):
        return exists(path)
    return is_file(path) or exists(join(path, MANIFEST))  # else it is what an interrupted upload has left


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
        unfinished = _hidden(path, "tmp")
        os.rename(path, unfinished)
        remove(unfinished)
    elif own := _own_files(path):
        journal = _write_journal(path, own)
        remove(join(path, MANIFEST))
        _settle(path, journal)
        remove_empty_folders(path, os.path.dirname(path))
    elif exists(path):
        read_manifest(path)
    if root is not None:
        remove_empty_folders(path.rpartition("/")[0], root)


def write_pointer(path: str, target: str) -> None:
    """Write the small file ``path`` that names the checkpoint ``target``, all at once."""
    relative = os.path.dirname(path) == os.path.dirname(target.rstrip("/"))
    content = json.dumps({"checkpoint": os.path.basename(target.rstrip("/")) if relative else target}).encode()
    with _naming(f"pointer {path!r}"):
        write_file(path, content)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Raise whatever a file system raises as an OSError that says what could not be written."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        plain = isinstance(number, int) and getattr(error, "strerror", None) == os.strerror(number)
        why = os.strerror(number or 0) if plain else f"{type(error).__name__}: {error}"
        message = f"{what} could not be written: {why}"
        raise (OSError(number, message) if isinstance(number, int) else OSError(message)) from error


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
        self, checkpoint: dict[str, Any], facts: dict[str, Any], rng: list[Any] | None, copy: bool, rank: int = 0
    ) -> None:
        self.facts, self.copy, self.rank = facts, copy, rank
        self.files: dict[str, bytes | StagedTensors] = {}
        objects: dict[str, Any] = {}
        rest = dict(checkpoint)
        model = rest.pop("state_dict", {})
        if extra := {name: value for name, value in model.items() if not (is_plain(value) and is_name(name))}:
            rest["model_extra_state"] = extra
        model = {name: value for name, value in model.items() if name not in extra}
        self._stage("model/model", model)

        tensors: dict[str, Tensor] = {}
        optimizer_tensors: dict[str, Tensor] = {}
        encoded = {
            key: encode(value, key, optimizer_tensors if key == "optimizer_states" else tensors, objects)
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
        pieces = {key: value for key, value in tensors.items() if isinstance(value, Piece)}
        if own := {key: piece for key, piece in pieces.items() if piece.mine}:
            self.files[f"{name.partition('/')[0]}/rank-{self.rank}.safetensors"] = StagedTensors(own, self.copy)
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
        files = self._write_own(target) if self.peers is None else self.peers.gather(target, self._write_own)
        return {"format": FORMAT, "torch": torch.__version__, "files": files, **about, **self.facts}

    def file_names(self) -> list[str]:
        """All that may be written, by other processes too."""
        ranks = range(1 if self.peers is None else self.peers.world_size)
        groups = ("model", "optimizer", "state")
        return [*self.files, *(f"{group}/rank-{rank}.safetensors" for group in groups for rank in ranks)]

    def _write_own(self, target: str) -> dict[str, Any]:
        files: dict[str, Any] = {}
        for name, content in self.files.items():
            with writing(join(target, *name.split("/"))) as file:
                sum_ = _Checksum(file)
                content.write(sum_) if isinstance(content, StagedTensors) else sum_.write(content)
            files[name] = {"size": sum_.size, "crc32": sum_.crc32}
        return files


def save_checkpoint(checkpoint: dict[str, Any], path: str, facts: dict[str, Any], rng: list[Any] | None) -> None:
    """Write a checkpoint; arguments as of :class:`Snapshot`, whose :meth:`~Snapshot.write` this calls."""
    Snapshot(checkpoint, facts, rng, copy=False).write(os.fspath(path))


def _commit(snapshot: Snapshot, path: str) -> None:
    if is_file(path) and _pointed(path) is None:
        raise FileExistsError("a file is there that is no checkpoint; remove it, or save elsewhere")
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
    _sweep(parent or ".")
    replaces = os.path.lexists(path)
    temporary = _hidden(path, "tmp")
    try:
        write_file(join(temporary, MANIFEST), _seal_manifest(snapshot.write_files(temporary, {})))
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
    _settle_journals(path)
    if is_file(path):
        remove(path)  # a pointer at a store
    there = {*list_names(path)} if is_local(path) else {name.partition("/")[0] for name in list_files(path)}
    before = _own_files(path)
    if MANIFEST in there and not before:
        raise FileExistsError(f"{MANIFEST} is there, and not that of a checkpoint; remove it, or save elsewhere")
    names = snapshot.file_names()
    is_free = not before and there.isdisjoint(name.partition("/")[0] for name in names)
    folder = "" if is_free else uuid.uuid4().hex[:8]
    journal = _write_journal(path, [*before, *(f"{folder}/{name}".lstrip("/") for name in names)])
    target = join(path, folder) if folder else path
    try:
        manifest = snapshot.write_files(target, {"folder": folder} if folder else {})
    except BaseException:
        with suppress(Exception):  # the store may be out of reach
            _settle(path, journal)
        raise
    if is_local(path):
        for own in {path, target, *(os.path.dirname(_file(path, name, manifest)) for name in manifest["files"])}:
            sync_directory(own)
    # If this fails, nobody knows whether it has arrived, or will: the files that it names must stay.
    write_file(join(path, MANIFEST), _seal_manifest(manifest))
    _settle(path, journal)


def _own_files(path: str) -> list[str]:
    """The files of the checkpoint in a folder; none if there is no checkpoint."""
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return []
    return [MANIFEST, *(f"{manifest.get('folder', '')}/{name}".lstrip("/") for name in manifest["files"])]


def _is_all_ours(path: str) -> bool:
    """Whether a local folder holds a checkpoint and nothing else, and another can take its place."""
    if not _can_move(path) or not (own := {*_own_files(path)}):
        return False
    return {name.partition("/")[0] for name in own}.issuperset(list_names(path)) and own.issuperset(list_files(path))


def _can_move(path: str) -> bool:
    """Whether a folder can be renamed: it is local, no link, no disk, not where this program works, ours to move."""
    if not is_local(path) or os.path.islink(path) or os.path.ismount(path):
        return False
    here, real = "", os.path.realpath(path)
    with suppress(FileNotFoundError):  # somebody has removed where we are
        here = os.getcwd()
    return os.access(os.path.dirname(real), os.W_OK) and not join(here, "").startswith(join(real, ""))


def _hidden(path: str, kind: str) -> str:
    """A name beside ``path`` for what is there for a while only; it says which process made it."""
    parent, name = os.path.split(path)
    return join(parent, f".{name}.{_owner()}.{uuid.uuid4().hex[:8]}.{kind}")


def _journals_of(path: str) -> str:
    """How the journals of changes to a folder begin: inside a local one, as the one around it may be read-only."""
    parent, _, name = path.rpartition("/")
    inside = is_local(path) or parent.endswith(":/")  # a bucket has nothing around it
    return join(path if inside else parent, f".{name}.")


def _write_journal(path: str, names: list[str]) -> str:
    """Note that these files are ours, whatever happens next."""
    journal = f"{_journals_of(path)}{_owner()}.{uuid.uuid4().hex[:8]}.tmp"
    write_file(journal, json.dumps(names).encode())
    return journal


def _settle(path: str, journal: str) -> None:
    """Remove those of the files that a journal lists which are no part of the checkpoint that is there now."""
    remove_files(path, {*json.loads(read_bytes(journal))} - {*_own_files(path)})
    remove(journal)


def _settle_journals(path: str) -> None:
    """Clear up what changes to a folder have left that broke off."""
    folder, _, beginning = _journals_of(path).rpartition("/")
    for name in list_names(folder) if exists(folder) else []:
        found = _UNFINISHED.fullmatch(name)
        if found is None or f".{found['name']}." != beginning or not is_file(join(folder, name)):
            continue
        if _is_at_work(found["place"], found["process"]):
            continue
        try:
            _settle(path, join(folder, name))
        except ValueError:  # it broke off while it was written, and nothing came after
            remove(join(folder, name))
        if is_local(path):
            remove_files(path, fnmatch.filter(list_names(path), f"{MANIFEST}.????????.tmp"))


def _owner() -> str:
    """This process, in the names of what is not finished: its machine or container, and its number there."""
    namespace = os.stat("/proc/self/ns/pid").st_ino if os.path.exists("/proc/self/ns/pid") else 0
    return f"{socket.gethostname()}-{namespace}-{os.getpid()}".replace(".", "_")


def _own_name(hidden: str) -> str:
    """``name`` of ``.name.owner.number.tmp`` or ``.old``."""
    return hidden[1:].rsplit(".", 3)[0]


def _sweep(directory: str) -> None:
    """Remove what saves of processes that are gone have left unfinished in a local folder."""
    for name in os.listdir(directory):
        found = _UNFINISHED.fullmatch(name)
        if found is None:
            continue
        path = join(directory, name)
        try:
            if found["place"] != _owner().rpartition("-")[0]:  # nobody here knows whether it lives
                gone = time.time() - os.path.getmtime(path) > _FORGOTTEN
            else:
                gone = int(found["process"]) != os.getpid() and not _lives(int(found["process"]))
        except OSError:  # another process was quicker
            continue
        if gone and (name.endswith(".tmp") or exists(join(directory, found["name"]))):
            shutil.rmtree(path, ignore_errors=True)


def _is_at_work(place: str, process: str) -> bool:
    """Whether that is another process of this machine, and lives."""
    return place == _owner().rpartition("-")[0] and int(process) != os.getpid() and _lives(int(process))


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        pass
    return True


def _sync_directories(path: str) -> None:
    for directory, _, _ in os.walk(path):
        sync_directory(directory)


def _move_into_place(temporary: str, path: str, replaces: bool) -> None:
    _sync_directories(temporary)
    replaced = None
    if replaces and os.path.lexists(path):
        replaced = _hidden(path, "old")
        os.rename(path, replaced)
    try:
        os.rename(temporary, path)  # fails if another run has put a checkpoint there meanwhile
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
        except Exception as error:  # whatever a user's object raises must not lose the checkpoint
            if not has_plain(value):
                print(f"Checkpoint: {key} could not be pickled and is left out: {error}")
    if pickled:
        files["objects.pkl"] = pickle.dumps((script_name(), pickled))
    if needed := [key for key in pickled if not has_plain(objects[key])]:
        print(f"Checkpoint: {', '.join(needed)}: neither tensors nor JSON, kept in objects.pkl")


class _Checksum:
    """Passes on what is written to ``file``, and takes its size and checksum."""

    def __init__(self, file: Any) -> None:
        self.file, self.size, self.crc32 = file, 0, 0

    def write(self, content: Any) -> None:
        self.file.write(content)
        self.size += len(content)
        self.crc32 = zlib.crc32(content, self.crc32)


def _seal_manifest(body: dict[str, Any]) -> bytes:
    return _dump({"body": body, "crc32": zlib.crc32(_dump(body))})


def _dump(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()


# -- reading --------------------------------------------------------------------------------------------------------


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: if there is none, or it was altered, or is of a later format.
    """
    name = join(path, MANIFEST)
    if not is_file(name):  # to open a pipe would wait for somebody to write
        raise CheckpointError(f"{path!r} is no complete checkpoint: {MANIFEST} is missing, or no file")
    content = read_bytes(name, limit=_LARGEST_MANIFEST)
    with naming_damage(path, f"{MANIFEST} was altered or truncated"):
        sealed = json.loads(content)
        body = sealed["body"]
        if _dump(sealed) != content or zlib.crc32(_dump(body)) != sealed["crc32"]:
            raise ValueError("its checksum differs")
        later = body["format"] > FORMAT
    if later:
        raise CheckpointError(
            f"checkpoint {path!r} has format {body['format']}, this version reads up to {FORMAT}; upgrade"
        )
    with naming_damage(path, f"{MANIFEST} is not as it should be"):
        for name in [*body["files"], body.get("folder", "files")]:
            if {*name.split("/")} & {"", ".", ".."} or "\\" in name or ":" in name:
                raise ValueError(f"it lists {name!r}, which is no file inside of it")
        if not all(type(own[fact]) is int for own in body["files"].values() for fact in ("size", "crc32")):
            raise TypeError("a file's size or checksum is no number")
        float(body.get("created", 0.0))
        dict(body.get("metrics", {}))
    return body


@contextmanager
def naming_damage(path: str, what: str) -> Iterator[None]:
    """Raise whatever content that is damaged, or was made to harm, makes others raise as a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"checkpoint {path!r} is damaged: {what} ({type(error).__name__}: {error})") from error


def is_complete(path: str) -> bool:
    """Whether ``path`` holds a valid manifest and all files that it lists, in their sizes."""
    try:
        manifest = read_manifest(path)
        return all(size(_file(path, name, manifest)) == own["size"] for name, own in manifest["files"].items())
    except (CheckpointError, OSError):
        return False


def _file(path: str, name: str, manifest: dict[str, Any]) -> str:
    return join(path, *(manifest["folder"],) if "folder" in manifest else (), *name.split("/"))


def _read_verified(path: str, name: str, manifest: dict[str, Any]) -> bytes:
    expected = manifest["files"][name]
    file = _file(path, name, manifest)
    content, found = b"", expected["size"]
    try:
        if is_local(path):
            if not is_file(file):
                raise FileNotFoundError
            found = size(file)
        if found == expected["size"]:
            content = read_bytes(file)
            found = len(content)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path!r} is damaged: {name} is missing, or no file") from None
    except MemoryError:
        raise CheckpointError(f"checkpoint {path!r}: {name}, of {found} bytes, is larger than the memory") from None
    if found != expected["size"]:
        raise CheckpointError(
            f"checkpoint {path!r} is damaged: {name} has {found} bytes, {expected['size']} were written"
        )
    if zlib.crc32(content) != expected["crc32"]:
        raise CheckpointError(f"checkpoint {path!r} is damaged: {name} was altered (its checksum differs)")
    return content


def load_checkpoint(path: str, weights_only: bool | None = None, map_location: Any = None) -> dict[str, Any]:
    """Read and verify a checkpoint. No code runs unless ``weights_only`` is False.

    Args:
        path: the directory, or a pointer to it, local or any fsspec URL; or a file of weights alone, as
            :mod:`.foreign` reads it.
        weights_only: False loads pickled objects too; else a :class:`~.encoding.SealedObject` stands for each.
        map_location: the device to load tensors onto (default: the CPU), or a dict or function as of ``torch.load``.

    Returns:
        What was given to :func:`save_checkpoint`, ``"rng"`` and ``"manifest"`` beside it.

    Raises:
        CheckpointError: if a file is missing, altered or truncated; it is named.
    """
    path = resolve(path)
    if is_file(path):
        return _load_weights(path, map_location)
    manifest = read_manifest(path)
    content: dict[str, bytes] = {}
    files: dict[str, list[str]] = {}  # of tensors: those of a folder belong together, but each rank's own generators
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            stem = name.removesuffix(".safetensors")
            files.setdefault(stem if stem.startswith("rng/") else stem.partition("/")[0], []).append(name)
        else:
            content[name] = _read_verified(path, name, manifest)
    # One file after the other, as memory may not suffice for all.
    tensors: dict[str, Any] = {}
    for group, names in files.items():
        device = None if group.startswith("rng/") else map_location
        parts = (read_tensors(_read_verified(path, name, manifest), device) for name in names)
        try:
            tensors[group] = join_pieces(parts, sum(manifest["files"][name]["size"] for name in names))
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path!r} is damaged: in {', '.join(names)}, {error}") from error
    objects: dict[str, Any] | None = None
    if weights_only is False:
        objects = _unpickle_objects(content["objects.pkl"]) if "objects.pkl" in content else {}

    def state(name: str, beside: str = "") -> Any:
        own = {**tensors.get(name, {}), **tensors.get(beside, {})}
        return decode(json.loads(content[f"{name}.json"]), own, objects)

    with naming_damage(path, "its state is not as it should be"):
        checkpoint: dict[str, Any] = {**state("state", "optimizer")}
        checkpoint["state_dict"] = {**tensors.get("model", {}), **checkpoint.pop("model_extra_state", {})}
        ranks = sum(name.startswith("rng/") and name.endswith(".json") for name in content)
        checkpoint["rng"] = [state(f"rng/rank-{rank}") for rank in range(ranks)]
    checkpoint["manifest"] = manifest
    return checkpoint


def _unpickle_objects(content: bytes) -> dict[str, Any]:
    """The objects of ``objects.pkl``, by key; one that cannot be made here raises only where it is used."""
    from ...strategies.pickling import loads

    pickled = pickle.loads(content)
    script, pickled = pickled if isinstance(pickled, tuple) else ("", pickled)  # older ones have no script
    objects: dict[str, Any] = {}
    for key, value in pickled.items():
        try:
            objects[key] = loads(value, script)
        except Exception as error:  # whatever a user's class raises
            origin = f"the program {script!r}" if script else "another program"
            reason = f"was pickled in {origin} and cannot be made here: {error}; import here what it is made of first"
            objects[key] = SealedObject(key, reason)
    return objects


def _load_weights(path: str, map_location: Any) -> dict[str, Any]:
    try:
        return {**load_weights_file(path, map_location), "rng": [], "manifest": {"module": "another program"}}
    except (ValueError, TypeError) as error:
        raise CheckpointError(str(error)) from error
