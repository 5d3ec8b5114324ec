"""Reads a checkpoint, and verifies that it is as it was written."""

from __future__ import annotations

import json
import pickle
import zlib
from typing import Any

from ...strategies.group import GroupMember
from ...strategies.pickling import loads
from ...strategies.stored_tensors import StoredState
from ..errors import CheckpointError, describe_error
from .checksums import checksum_of, verify
from .file_tensors import open_tensors
from .find import resolve
from .manifest import Manifest, naming_damage, path_of, read_manifest
from .serialization import State, UnloadedObject, decode, with_stored
from .single_file import OURS, unpack
from .storage import storage_of, top_of
from .tensors import device_of, read_tensors
from .weights import load_weights_file
from .writer import weight_set_folder

_ALTERED = "was altered (its checksum differs)"
# A file of more bytes is not read only to tell better what is wrong with it.
_MOST_TO_READ_FOR_AN_ERROR = 2**34


def load_checkpoint(
    path: str, weights_only: bool | None = None, map_location: Any = None
) -> State:
    """Read and verify a checkpoint. No code runs unless ``weights_only`` is False.

    Args:
        path: the directory or file, or a pointer to it, local or any fsspec URL; or a file of another program, as
            :mod:`.weights` reads it.
        weights_only: False loads pickled objects too; else a :class:`~.serialization.UnloadedObject` stands for each.
        map_location: the device to load tensors onto (default: the CPU), or a dict or function as of ``torch.load``.

    Returns:
        What was given to :func:`~.writer.save_checkpoint`, ``"rng"`` and ``"manifest"`` beside it.

    Raises:
        CheckpointError: if a file is missing, altered or truncated; it is named.
    """
    checkpoint = open_checkpoint(path, weights_only, map_location)
    return _plain(checkpoint)


def _plain(value: Any) -> Any:
    """The same with all tensors read, and no dict that knows of files."""
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if type(value) in (dict, StoredState):
        return {key: _plain(item) for key, item in value.items()}
    return value


def open_checkpoint(
    path: str,
    weights_only: bool | None = None,
    map_location: Any = None,
    group: GroupMember | None = None,
    keeps_parts: bool = False,
) -> State:
    """Do what :func:`load_checkpoint` does, but read weights and optimizer states only as they are asked for.

    Args:
        path: as the two that follow, of :func:`load_checkpoint`.
        weights_only: see there.
        map_location: see there.
        group: processes that all call this, and verify the checkpoint together: then it is a collective.
        keeps_parts: each of them keeps parts of the tensors, and will not read all of them.

    Returns:
        The same, with a :class:`~...strategies.stored_tensors.StoredState` for each dict of such tensors.
    """
    group = group or GroupMember()
    opened = _opened(path, weights_only, map_location, keeps_parts, group)
    if not isinstance(opened, _Folder):
        return opened
    path = opened.path
    opened.verify(group)
    tensors = opened.tensors
    content = opened.content
    objects = None
    if weights_only is False:
        objects = unpickle_objects(content.get("objects.pkl"))

    def state_in(name: str, beside: str = "") -> Any:
        own = _plain(with_stored(tensors.get(name, {})))
        state = json.loads(content[f"{name}.json"])
        return decode(state, {**own, **tensors.get(beside, {})}, objects)

    with naming_damage(path, "its state is not as it should be"):
        checkpoint: State = {**state_in("state", "optimizer")}
        extra = checkpoint.pop("model_extra_state", {})
        checkpoint["state_dict"] = with_stored({**tensors.get("model", {}), **extra})
        prefix = weight_set_folder("")
        for group_name in tensors:
            if group_name.startswith(prefix):
                sets = checkpoint.setdefault("weight_sets", {})
                weights = with_stored(tensors[group_name])
                sets[group_name.removeprefix(prefix)] = weights
        ranks = [n for n in content if n.startswith("rng/") and n.endswith(".json")]
        checkpoint["rng"] = [state_in(f"rng/rank-{i}") for i in range(len(ranks))]
    checkpoint["manifest"] = opened.manifest
    return checkpoint


def _opened(
    path: str,
    weights_only: bool | None,
    map_location: Any,
    keeps_parts: bool,
    group: GroupMember,
) -> _Folder | State:
    """Open a folder, or read a file, in all processes or in none. A collective.

    Raises:
        CheckpointError: if one of them cannot.
    """
    opened = None
    failure = None
    try:
        path = resolve(path)
        if storage_of(path).is_file(path):
            opened = _load_file(path, weights_only, map_location)
        else:
            opened = _Folder(path, map_location, keeps_parts)
    except Exception as error:
        # A store's library has errors of its own.
        failure = error
    told = group.gather_objects(  # collective
        (failure and describe_error(failure), isinstance(opened, _Folder))
    )
    if isinstance(failure, (CheckpointError, OSError)):
        raise failure
    if failure is not None:
        raise CheckpointError(
            f"checkpoint {path!r} cannot be read: {describe_error(failure)}"
        ) from failure
    for text, _ in told:
        if text:
            raise CheckpointError(text)
    if len({is_folder for _, is_folder in told}) > 1:
        raise CheckpointError(
            f"checkpoint {path!r} is a folder for some processes, and a file for others"
        )
    assert opened is not None
    return opened


class _Folder:
    """A checkpoint that is a folder.

    Args:
        path: its path.
        map_location: where its tensors are put.
        keeps_parts: as of :func:`open_checkpoint`.

    Attributes:
        manifest: what it lists.
        content: the small files, by name: JSON, objects, and the ranks' generators.
        tensors: by the files' group and name: those of one folder belong together, as they may hold shards of the same
            tensors.
    """

    def __init__(self, path: str, map_location: Any, keeps_parts: bool) -> None:
        self.path = path
        self.storage = storage_of(path, keeps=not keeps_parts)
        self.device = device_of(map_location)
        self.manifest = read_manifest(path)
        self.content: dict[str, bytes] = {}
        groups: dict[str, list[str]] = {}
        for name in self.manifest["files"]:
            stem, _, kind = name.rpartition(".")
            if kind == "safetensors":
                # Those of rng/ belong to a rank each.
                group = stem if stem.startswith("rng/") else top_of(stem)
                groups.setdefault(group, []).append(name)
            if kind != "safetensors" or name.startswith("rng/"):
                self.content[name] = _read(path, name, self.manifest)
        self.tensors = {
            group: self._open(group, names) for group, names in groups.items()
        }

    def _open(self, group: str, names: list[str]) -> dict[str, Any]:
        sizes = {}
        try:
            if group.startswith("rng/"):
                # Generators take their states from the CPU.
                return read_tensors(self.content[names[0]], None)
            for name in names:
                _check_file(self.path, name, self.manifest)
                sizes[self._path_of(name)] = self.manifest["files"][name]["size"]
                self.storage.note(self._path_of(name))
            return dict(open_tensors(sizes, self.storage, self.device))
        except FileNotFoundError:
            missing = names[len(sizes)]
            raise _damage(self.path, f"{missing} is missing, or no file") from None
        except ValueError as error:
            raise self._damage_in(names, error) from error

    def _damage_in(self, names: list[str], error: ValueError) -> CheckpointError:
        """Return an error that names the file that was altered; where none was, what is wrong with them."""
        for name in names:
            written = self.manifest["files"][name]
            if written["size"] > _MOST_TO_READ_FOR_AN_ERROR:
                continue
            now = checksum_of(self._path_of(name), written["size"], self.storage)
            if now != written["crc32"]:
                return _damage(self.path, f"{name} {_ALTERED}")
        return _damage(self.path, f"in {', '.join(names)}, {error}")

    def _path_of(self, name: str) -> str:
        return path_of(self.path, name, self.manifest)

    def verify(self, group: GroupMember) -> None:
        """See that the large files are as they were written. A collective.

        Raises:
            CheckpointError: if one is not, naming it.
        """
        names = {
            self._path_of(name): name
            for name in self.manifest["files"]
            if name not in self.content
        }
        files = self.manifest["files"]
        sizes = {path: files[name]["size"] for path, name in names.items()}
        checksums = {path: files[name]["crc32"] for path, name in names.items()}
        for altered in verify(sizes, checksums, self.storage, group):
            raise _damage(self.path, f"{names[altered]} {_ALTERED}")


def _load_file(path: str, weights_only: bool | None, map_location: Any) -> State:
    """:func:`load_checkpoint`, of one file."""
    try:
        content = load_weights_file(path, map_location, weights_only)
    except (ValueError, TypeError) as error:
        raise CheckpointError(str(error)) from error
    if OURS not in content:
        return {"manifest": {"module": "another program"}, "rng": [], **content}
    with naming_damage(path, "its state is not as it should be"):
        objects = None
        if weights_only is False:
            objects = unpickle_objects(content[OURS]["objects"])
        return unpack(content, objects)


def _read(
    path: str,
    name: str,
    manifest: Manifest,
) -> bytes:
    """The content of a small file, if it is as it was written."""
    written = manifest["files"][name]
    content = b""
    try:
        _check_file(path, name, manifest)
        content = storage_of(path).read(path_of(path, name, manifest))
    except FileNotFoundError:
        raise _damage(path, f"{name} is missing, or no file") from None
    except MemoryError:
        raise CheckpointError(
            f"checkpoint {path!r}: {name}, of {written['size']} bytes, is larger than the memory"
        ) from None
    _check_size(len(content), path, name, manifest)
    if zlib.crc32(content) != written["crc32"]:
        raise _damage(path, f"{name} {_ALTERED}")
    return content


def _check_file(path: str, name: str, manifest: Manifest) -> None:
    """See that a local file is one, and how large it is, before it is opened: a pipe would block."""
    file = path_of(path, name, manifest)
    storage = storage_of(path)
    if storage.is_local:
        if not storage.is_file(file):
            raise FileNotFoundError
        _check_size(storage.size(file), path, name, manifest)


def _check_size(size: int, path: str, name: str, manifest: Manifest) -> None:
    written = manifest["files"][name]["size"]
    if size != written:
        raise _damage(path, f"{name} has {size} bytes, {written} were written")


def _damage(path: str, what: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path!r} is damaged: {what}")


def unpickle_objects(content: bytes | None) -> State:
    """The objects of ``objects.pkl``, by key; an object that cannot be made here raises only when it is used."""
    if content is None:
        return {}
    pickled = pickle.loads(content)
    # Older files have no script.
    script, pickled = pickled if isinstance(pickled, tuple) else ("", pickled)
    origin = f"the program {script!r}" if script else "another program"
    objects = {}
    for key, value in pickled.items():
        try:
            objects[key] = loads(value, script)
        except Exception as error:
            # A user's class may raise anything.
            reason = f"was pickled in {origin} and cannot be made here: {error}; import here what it is made of first"
            objects[key] = UnloadedObject(key, reason)
    return objects
