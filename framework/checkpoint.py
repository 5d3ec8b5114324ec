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

A local checkpoint is written under a temporary name, flushed, and renamed; on an object store the manifest goes last.
So a directory with a valid manifest is a whole checkpoint, and one without is none.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..strategies.pieces import Piece
from .encoding import decode, encode
from .foreign import is_weights_file, load_weights_file
from .places import (
    exists,
    find_folders_with,
    is_file,
    is_local,
    join,
    list_names,
    plain,
    read_bytes,
    remove,
    size,
    sync_directory,
    write_file,
    writing,
)
from .tensor_files import StagedTensors, is_name, is_plain, join_pieces, read_tensors

if TYPE_CHECKING:
    from .saving import Peers

FORMAT = 1
MANIFEST = "manifest.json"
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
    try:
        target = json.loads(read_bytes(path))["checkpoint"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path!r} is neither a checkpoint directory, nor a pointer to one, nor a file of weights (damaged?)"
        ) from None
    target = target if os.path.isabs(target) or "://" in target else join(os.path.dirname(path), target)
    if not exists(target) and is_local(target):
        return _replaced(target) or target
    return target


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
    return sorted(found, key=lambda path: (found[path]["created"], path), reverse=True)


def is_taken(path: str) -> bool:
    """Whether there is something at ``path`` that a new checkpoint must not take the place of unasked."""
    if is_local(path):
        return exists(path)
    return is_file(path) or exists(join(path, MANIFEST))  # else it is what an interrupted upload has left


def remove_checkpoint(path: str) -> None:
    """Delete a checkpoint, or a pointer: the manifest first, so that what an interruption leaves is no checkpoint."""
    remove(join(path, MANIFEST))
    remove(path)


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
                (_write_local if is_local(path) else _write_remote)(self, path)
            except Exception as error:
                if peers is not None:
                    peers.give_up(error)
                raise

    def write_files(self, target: str, about: dict[str, Any]) -> dict[str, Any]:
        """Write all files into the folder ``target``; returns what the manifest is to hold."""
        files = self._write_own(target) if self.peers is None else self.peers.gather(target, self._write_own)
        return {"format": FORMAT, "torch": torch.__version__, "files": files, **about, **self.facts}

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


def _write_local(snapshot: Snapshot, path: str) -> None:
    parent, name = os.path.split(path)
    os.makedirs(parent or ".", exist_ok=True)
    _sweep(parent or ".")
    temporary = join(parent, f".{name}.{_owner()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write_file(join(temporary, MANIFEST), _seal_manifest(snapshot.write_files(temporary, {})))
        _move_into_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_remote(snapshot: Snapshot, path: str) -> None:
    # A store has no rename: the manifest, which is one small file, is what makes the others count. If there is one
    # already, the new files go beside the old ones, into a folder of their own that the new manifest names.
    replaced = exists(join(path, MANIFEST))
    if not replaced:
        remove(path)  # what an interrupted upload left
    before = [join(path, name) for name in list_names(path) if name != MANIFEST] if replaced else []
    folder = uuid.uuid4().hex[:8] if replaced else ""
    target = join(path, folder) if folder else path
    try:
        manifest = snapshot.write_files(target, {"folder": folder} if folder else {})
    except BaseException:
        with suppress(Exception):  # the store may be out of reach
            remove(target)
        raise
    # If this fails, nobody knows whether it has arrived, or will: the files that it names must stay.
    write_file(join(path, MANIFEST), _seal_manifest(manifest))
    for old in before:
        remove(old)


def _owner() -> str:
    """This process, in the names of what is not finished: its machine or container, and its number there."""
    namespace = os.stat("/proc/self/ns/pid").st_ino if os.path.exists("/proc/self/ns/pid") else 0
    return f"{socket.gethostname()}-{namespace}-{os.getpid()}".replace(".", "_")


def _own_name(hidden: str) -> str:
    """``name`` of ``.name.owner.number.tmp`` or ``.old``."""
    return hidden[1:].rsplit(".", 3)[0]


def _sweep(directory: str) -> None:
    """Remove what saves of processes that are gone have left unfinished in a local folder."""
    here, _, own = _owner().rpartition("-")
    for name in os.listdir(directory):
        if not name.startswith(".") or not name.endswith((".tmp", ".old")) or name.count(".") < 4:
            continue
        place, _, process = name.rsplit(".", 3)[1].rpartition("-")
        path = join(directory, name)
        try:
            if place != here:  # nobody here knows whether it lives
                gone = time.time() - os.path.getmtime(path) > _FORGOTTEN
            else:
                gone = process != own and process.isdigit() and not _lives(int(process))
        except OSError:  # another process was quicker
            continue
        if gone and (name.endswith(".tmp") or exists(join(directory, _own_name(name)))):
            shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        pass
    return True


def _move_into_place(temporary: str, path: str) -> None:
    for directory, _, _ in os.walk(temporary):
        sync_directory(directory)
    parent, name = os.path.split(path)
    replaced = None
    if os.path.lexists(path):
        replaced = join(parent, f".{name}.{_owner()}.{uuid.uuid4().hex[:8]}.old")
        os.rename(path, replaced)
    try:
        os.rename(temporary, path)
    except BaseException:
        if replaced is not None:
            os.rename(replaced, path)
        raise
    sync_directory(parent or ".")
    if replaced is not None:
        remove_checkpoint(replaced)


def _pickle_objects(objects: dict[str, Any], files: dict[str, Any]) -> None:
    """Pickle each object by itself, so that one that cannot be pickled does not lose the others."""
    import cloudpickle

    pickled: dict[str, bytes] = {}
    for key, value in objects.items():
        try:
            pickled[key] = cloudpickle.dumps(value)
        except Exception as error:  # whatever a user's object raises must not lose the checkpoint
            print(f"Checkpoint: {key} could not be pickled and is left out: {error}")
    if pickled:
        files["objects.pkl"] = pickle.dumps(pickled)
        print(f"Checkpoint: {', '.join(pickled)}: neither tensors nor JSON, kept in objects.pkl")


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
    if not exists(name):
        raise CheckpointError(f"{path!r} is no complete checkpoint: {MANIFEST} is missing")
    content = read_bytes(name)
    sealed: Any = None
    try:
        sealed = json.loads(content)
        valid = _dump(sealed) == content and zlib.crc32(_dump(sealed["body"])) == sealed["crc32"]
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise CheckpointError(f"checkpoint {path!r} is damaged: {MANIFEST} was altered or truncated")
    if sealed["body"]["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {path!r} has format {sealed['body']['format']}, this version reads up to {FORMAT}; upgrade"
        )
    return sealed["body"]


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
    try:
        content = read_bytes(_file(path, name, manifest))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path!r} is damaged: {name} is missing") from None
    if len(content) != expected["size"]:
        raise CheckpointError(
            f"checkpoint {path!r} is damaged: {name} has {len(content)} bytes, {expected['size']} were written"
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
        map_location: the device to load tensors onto (default: the CPU).

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
    tensors = {
        group: _join(path, (read_tensors(_read_verified(path, name, manifest), map_location) for name in names))
        for group, names in files.items()
    }
    objects: dict[str, Any] | None = None
    if weights_only is False:
        objects = {}
        if "objects.pkl" in content:
            pickled = pickle.loads(content["objects.pkl"])
            objects = {key: pickle.loads(value) for key, value in pickled.items()}

    def state(name: str, beside: str = "") -> Any:
        own = {**tensors.get(name, {}), **tensors.get(beside, {})}
        return decode(json.loads(content[f"{name}.json"]), own, objects)

    checkpoint: dict[str, Any] = state("state", "optimizer")
    checkpoint["state_dict"] = {**tensors.get("model", {}), **checkpoint.pop("model_extra_state", {})}
    ranks = sum(name.startswith("rng/") and name.endswith(".json") for name in content)
    checkpoint["rng"] = [state(f"rng/rank-{rank}") for rank in range(ranks)]
    checkpoint["manifest"] = manifest
    return checkpoint


def _join(path: str, files: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    try:
        return join_pieces(files)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path!r} is damaged: {error}") from None


def _load_weights(path: str, map_location: Any) -> dict[str, Any]:
    try:
        return {**load_weights_file(path, map_location), "rng": [], "manifest": {"module": "another program"}}
    except ValueError as error:
        raise CheckpointError(str(error)) from error
