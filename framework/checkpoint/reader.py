"""Reading a checkpoint, verified."""

from __future__ import annotations

import json
import pickle
import zlib
from typing import Any

from ..errors import CheckpointError
from .find import resolve
from .manifest import naming_damage, path_of, read_manifest
from .serialization import SealedObject, decode
from .storage import (
    is_file,
    is_local,
    read_bytes,
    size,
)
from .tensors import join_pieces, read_tensors
from .weights import load_weights_file


def _read_verified(path: str, name: str, manifest: dict[str, Any]) -> bytes:
    expected = manifest["files"][name]
    file = path_of(path, name, manifest)
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
        raise CheckpointError(
            f"checkpoint {path!r} is damaged: {name} is missing, or no file"
        ) from None
    except MemoryError:
        raise CheckpointError(
            f"checkpoint {path!r}: {name}, of {found} bytes, is larger than the memory"
        ) from None
    if found != expected["size"]:
        raise CheckpointError(
            f"checkpoint {path!r} is damaged: {name} has {found} bytes, {expected['size']} were written"
        )
    if zlib.crc32(content) != expected["crc32"]:
        raise CheckpointError(
            f"checkpoint {path!r} is damaged: {name} was altered (its checksum differs)"
        )
    return content


def load_checkpoint(
    path: str, weights_only: bool | None = None, map_location: Any = None
) -> dict[str, Any]:
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
    files: dict[
        str, list[str]
    ] = {}  # of tensors: those of a folder belong together, but each rank's own generators
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            stem = name.removesuffix(".safetensors")
            files.setdefault(
                stem if stem.startswith("rng/") else stem.partition("/")[0], []
            ).append(name)
        else:
            content[name] = _read_verified(path, name, manifest)
    # One file after the other, as memory may not suffice for all.
    tensors: dict[str, Any] = {}
    for group, names in files.items():
        device = None if group.startswith("rng/") else map_location
        parts = (
            read_tensors(_read_verified(path, name, manifest), device) for name in names
        )
        try:
            tensors[group] = join_pieces(
                parts, sum(manifest["files"][name]["size"] for name in names)
            )
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {path!r} is damaged: in {', '.join(names)}, {error}"
            ) from error
    objects: dict[str, Any] | None = None
    if weights_only is False:
        objects = (
            _unpickle_objects(content["objects.pkl"])
            if "objects.pkl" in content
            else {}
        )

    def state(name: str, beside: str = "") -> Any:
        own = {**tensors.get(name, {}), **tensors.get(beside, {})}
        return decode(json.loads(content[f"{name}.json"]), own, objects)

    with naming_damage(path, "its state is not as it should be"):
        checkpoint: dict[str, Any] = {**state("state", "optimizer")}
        checkpoint["state_dict"] = {
            **tensors.get("model", {}),
            **checkpoint.pop("model_extra_state", {}),
        }
        ranks = sum(
            name.startswith("rng/") and name.endswith(".json") for name in content
        )
        checkpoint["rng"] = [state(f"rng/rank-{rank}") for rank in range(ranks)]
    checkpoint["manifest"] = manifest
    return checkpoint


def _unpickle_objects(content: bytes) -> dict[str, Any]:
    """The objects of ``objects.pkl``, by key; one that cannot be made here raises only where it is used."""
    from ...strategies.pickling import loads

    pickled = pickle.loads(content)
    script, pickled = (
        pickled if isinstance(pickled, tuple) else ("", pickled)
    )  # older ones have no script
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
        return {
            **load_weights_file(path, map_location),
            "rng": [],
            "manifest": {"module": "another program"},
        }
    except (ValueError, TypeError) as error:
        raise CheckpointError(str(error)) from error
