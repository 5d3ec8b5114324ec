"""Reads a checkpoint, and verifies that it is as it was written."""

from __future__ import annotations

import json
import pickle
import zlib
from typing import Any

from ...strategies.pickling import loads
from ..errors import CheckpointError
from .find import resolve
from .manifest import Manifest, naming_damage, path_of, read_manifest
from .serialization import State, UnloadedObject, decode
from .single_file import OURS, unpack
from .storage import storage_of, top_of
from .tensors import join_shards, read_tensors
from .weights import load_weights_file
from .writer import weight_set_folder


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
    path = resolve(path)
    if storage_of(path).is_file(path):
        return _load_file(path, weights_only, map_location)
    manifest = read_manifest(path)
    content = {}
    # The files of one folder are read together, as they may hold shards of the same tensors; those of rng/ belong to a
    # rank each.
    groups = {}
    for name in manifest["files"]:
        stem, _, kind = name.rpartition(".")
        if kind == "safetensors":
            group = stem if stem.startswith("rng/") else top_of(stem)
            groups.setdefault(group, []).append(name)
        else:
            content[name] = _read(path, name, manifest)
    tensors = {}
    for group, names in groups.items():
        # Generators take their states from the CPU.
        device = None if group.startswith("rng/") else map_location
        tensors[group] = _read_tensors(path, names, manifest, device)
    objects = None
    if weights_only is False:
        objects = unpickle_objects(content.get("objects.pkl"))

    def state_in(name: str, beside: str = "") -> Any:
        own = {**tensors.get(name, {}), **tensors.get(beside, {})}
        return decode(json.loads(content[f"{name}.json"]), own, objects)

    with naming_damage(path, "its state is not as it should be"):
        checkpoint: State = {**state_in("state", "optimizer")}
        extra = checkpoint.pop("model_extra_state", {})
        checkpoint["state_dict"] = {**tensors.get("model", {}), **extra}
        prefix = weight_set_folder("")
        for group in tensors:
            if group.startswith(prefix):
                sets = checkpoint.setdefault("weight_sets", {})
                sets[group.removeprefix(prefix)] = tensors[group]
        ranks = [name for name in content if name.startswith("rng/")]
        checkpoint["rng"] = [state_in(f"rng/rank-{i}") for i in range(len(ranks))]
    checkpoint["manifest"] = manifest
    return checkpoint


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


def _read_tensors(
    path: str, names: list[str], manifest: Manifest, device: Any
) -> State:
    """The tensors of files that belong together, read one after the other, as memory may not suffice for all."""
    files = (read_tensors(_read(path, name, manifest), device) for name in names)
    size = sum(manifest["files"][name]["size"] for name in names)
    try:
        return join_shards(files, size)
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {path!r} is damaged: in {', '.join(names)}, {error}"
        ) from error


def _read(
    path: str,
    name: str,
    manifest: Manifest,
) -> bytes:
    """The content of a file, if it is as it was written."""
    written = manifest["files"][name]
    file, storage = path_of(path, name, manifest), storage_of(path)
    damaged = f"checkpoint {path!r} is damaged: {name}"
    content, size = b"", written["size"]
    try:
        if storage.is_local:
            # Before it is read, as a pipe would block, and a file that has grown may not fit the memory.
            if not storage.is_file(file):
                raise FileNotFoundError
            size = storage.size(file)
        if size == written["size"]:
            content = storage.read(file)
            size = len(content)
    except FileNotFoundError:
        raise CheckpointError(f"{damaged} is missing, or no file") from None
    except MemoryError:
        raise CheckpointError(
            f"checkpoint {path!r}: {name}, of {size} bytes, is larger than the memory"
        ) from None
    if size != written["size"]:
        raise CheckpointError(
            f"{damaged} has {size} bytes, {written['size']} were written"
        )
    if zlib.crc32(content) != written["crc32"]:
        raise CheckpointError(f"{damaged} was altered (its checksum differs)")
    return content


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
