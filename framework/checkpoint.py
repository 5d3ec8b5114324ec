"""Checkpoints on disk: a directory of tensors and JSON that is complete or does not count.

::

    epoch=3-step=400.ckpt/
      model/model.safetensors          parameters and buffers by name
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
import uuid
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .encoding import decode, encode

FORMAT = 1
MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used as asked; the message names it, what is wrong and the way out."""


# -- places: local paths by the standard library, all others through fsspec ------------------------------------------


def is_local(path: str) -> bool:
    """Whether ``path`` is no URL of another file system."""
    return "://" not in path


def _filesystem(path: str) -> Any:
    import fsspec

    return fsspec.core.url_to_fs(path)[0]


def join(path: str, *parts: str) -> str:
    """Join path or URL parts."""
    return os.path.join(path, *parts) if is_local(path) else "/".join([path.rstrip("/"), *parts])


def _replaced(path: str) -> str | None:
    """The complete checkpoint that was moved aside, if the process was killed before the new one took its place."""
    parent, name = os.path.split(path.rstrip("/"))
    if not os.path.isdir(parent or "."):
        return None
    aside = [other for other in os.listdir(parent or ".") if other.startswith(f".{name}.") and other.endswith(".old")]
    return next((found for other in aside if is_complete(found := os.path.join(parent, other))), None)


def read_bytes(path: str) -> bytes:
    """The content of a local or remote file."""
    if is_local(path):
        with open(path, "rb") as file:
            return file.read()
    return _filesystem(path).cat_file(path)


def _write_bytes(path: str, content: bytes) -> None:
    if not is_local(path):
        filesystem = _filesystem(path)
        filesystem.makedirs(filesystem._parent(path), exist_ok=True)
        filesystem.pipe_file(path, content)
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: str) -> None:
    """Make a rename inside ``path`` last over a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exists(path: str) -> bool:
    """Whether there is a file or directory."""
    return os.path.exists(path) if is_local(path) else _filesystem(path).exists(path)


def remove(path: str) -> None:
    """Delete a checkpoint: its manifest first, so that what an interruption leaves is no checkpoint."""
    if not exists(path):
        return
    if is_local(path):
        if os.path.exists(manifest := join(path, MANIFEST)):
            os.unlink(manifest)
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        return
    filesystem = _filesystem(path)
    if filesystem.exists(join(path, MANIFEST)):
        filesystem.rm_file(join(path, MANIFEST))
    filesystem.rm(path, recursive=True)


def write_pointer(path: str, target: str) -> None:
    """Write the small file ``path`` that names the checkpoint ``target``, all at once."""
    relative = os.path.dirname(path) == os.path.dirname(target.rstrip("/"))
    content = json.dumps({"checkpoint": os.path.basename(target.rstrip("/")) if relative else target}).encode()
    write_file(path, content)


def write_file(path: str, content: bytes) -> None:
    """Write a file all at once: what is at ``path`` is the old content or the new."""
    if not is_local(path):
        _write_bytes(path, content)
        return
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    _write_bytes(temporary, content)
    os.replace(temporary, path)
    _sync_directory(os.path.dirname(path) or ".")


def resolve(path: str) -> str:
    """The checkpoint directory that ``path`` is or points to.

    Raises:
        CheckpointError: if there is none.
    """
    path = os.fspath(path)
    if not exists(path) and is_local(path) and (replaced := _replaced(path)) is not None:
        return replaced
    if not exists(path):
        raise CheckpointError(f"there is no checkpoint at {path!r}")
    is_file = os.path.isfile(path) if is_local(path) else _filesystem(path).isfile(path)
    if not is_file:
        return path.rstrip("/")
    try:
        target = json.loads(read_bytes(path))["checkpoint"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path!r} is neither a checkpoint directory nor a pointer to one"
            " (a checkpoint of another framework, or a damaged pointer?)"
        ) from None
    target = target if os.path.isabs(target) or "://" in target else join(os.path.dirname(path), target)
    if not exists(target) and is_local(target):
        return _replaced(target) or target
    return target


# -- writing --------------------------------------------------------------------------------------------------------


def save_checkpoint(checkpoint: dict[str, Any], path: str, facts: dict[str, Any], rng: list[Any] | None) -> None:
    """Write ``checkpoint`` to the directory ``path``; when this returns, it is complete and on disk.

    Args:
        checkpoint: ``state_dict``, ``optimizer_states`` and anything else, nested as users may nest it.
        path: the directory, local or any fsspec URL. One that is there is replaced only by the complete new one.
        facts: JSON values for the manifest.
        rng: each process's random generators, by rank.

    Raises:
        OSError: if it could not be written. Locally, what was there before is untouched; an object store cannot
            rename, so there what was at ``path`` is removed first: give checkpoints names of their own.
    """
    path = os.fspath(path).rstrip("/")
    target = path
    if is_local(path):
        parent = os.path.dirname(path) or "."
        os.makedirs(parent, exist_ok=True)
        target = join(parent, f".{os.path.basename(path)}.{uuid.uuid4().hex[:8]}.tmp")
    elif exists(join(path, MANIFEST)):
        remove(path)  # an object store has no rename; without the manifest it is no checkpoint while files change
    try:
        _write_files(checkpoint, target, facts, rng)
        if is_local(path):
            _move_into_place(target, path)
    except BaseException:
        if is_local(path):
            shutil.rmtree(target, ignore_errors=True)
        raise


def _move_into_place(temporary: str, path: str) -> None:
    for directory, _, _ in os.walk(temporary):
        _sync_directory(directory)
    parent = os.path.dirname(path) or "."
    replaced = None
    if os.path.lexists(path):
        replaced = join(parent, f".{os.path.basename(path)}.{uuid.uuid4().hex[:8]}.old")
        os.rename(path, replaced)
    try:
        os.rename(temporary, path)
    except BaseException:
        if replaced is not None:
            os.rename(replaced, path)
        raise
    _sync_directory(parent)
    if replaced is not None:
        remove(replaced)


def _write_files(checkpoint: dict[str, Any], target: str, facts: dict[str, Any], rng: list[Any] | None) -> None:
    files: dict[str, Any] = {}
    objects: dict[str, Any] = {}

    def write(name: str, content: bytes) -> None:
        _write_bytes(join(target, *name.split("/")), content)
        files[name] = {"size": len(content), "crc32": zlib.crc32(content)}

    rest = dict(checkpoint)
    model = rest.pop("state_dict", {})
    tensors = {name: value for name, value in model.items() if isinstance(value, Tensor)}
    extra = {name: value for name, value in model.items() if not isinstance(value, Tensor)}
    if extra:
        rest["model_extra_state"] = extra
    write("model/model.safetensors", tensors_to_bytes(tensors))

    tensors, optimizer_tensors = {}, {}
    encoded = {
        key: encode(value, key, optimizer_tensors if key == "optimizer_states" else tensors, objects)
        for key, value in rest.items()
    }
    if "optimizer_states" in rest:
        write("optimizer/optimizer.safetensors", tensors_to_bytes(optimizer_tensors))
    write("state.json", json.dumps(encoded).encode())
    write("state.safetensors", tensors_to_bytes(tensors))
    for rank, generators in enumerate(rng or ()):
        tensors = {}
        write(f"rng/rank-{rank}.json", json.dumps(encode(generators, "rng", tensors, objects)).encode())
        write(f"rng/rank-{rank}.safetensors", tensors_to_bytes(tensors))
    if objects:
        _pickle_objects(objects, write)
    body = {"format": FORMAT, "torch": torch.__version__, "files": files, **facts}
    _write_bytes(join(target, MANIFEST), _seal_manifest(body))


def _pickle_objects(objects: dict[str, Any], write: Callable[[str, bytes], None]) -> None:
    """Pickle each object by itself, so that one that cannot be pickled does not lose the others."""
    import cloudpickle

    pickled: dict[str, bytes] = {}
    for key, value in objects.items():
        try:
            pickled[key] = cloudpickle.dumps(value)
        except Exception as error:  # whatever a user's object raises must not lose the checkpoint
            print(f"Checkpoint: {key} could not be pickled and is left out: {error}")
    if pickled:
        write("objects.pkl", pickle.dumps(pickled))
        print(f"Checkpoint: {', '.join(pickled)}: neither tensors nor JSON, kept in objects.pkl")


def tensors_to_bytes(tensors: dict[str, Tensor]) -> bytes:
    """The content of a safetensors file. Names that share one tensor are stored once, the others in its metadata."""
    from safetensors.torch import save

    own: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        tensor = tensor.to("cpu").contiguous()
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size() and storage.data_ptr() not in storages
        own[name] = tensor if whole else tensor.clone()  # two views of one buffer, or one of a larger, would be refused
        storages.add(own[name].untyped_storage().data_ptr())
    # Accelerate reads no file whose metadata does not name the format.
    return save(own, metadata={"format": "pt", **({"aliases": json.dumps(aliases)} if aliases else {})})


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
        files = read_manifest(path)["files"]
        return all(_size(join(path, name)) == expected["size"] for name, expected in files.items())
    except (CheckpointError, OSError):
        return False


def _size(path: str) -> int:
    return os.path.getsize(path) if is_local(path) else _filesystem(path).size(path)


def _read_verified(path: str, name: str, manifest: dict[str, Any]) -> bytes:
    expected = manifest["files"][name]
    try:
        content = read_bytes(join(path, *name.split("/")))
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
        path: the directory, or a pointer to it, local or any fsspec URL.
        weights_only: False loads pickled objects too; else a :class:`~.encoding.SealedObject` stands for each.
        map_location: the device to load tensors onto (default: the CPU).

    Returns:
        What was given to :func:`save_checkpoint`, ``"rng"`` and ``"manifest"`` beside it.

    Raises:
        CheckpointError: if a file is missing, altered or truncated; it is named.
    """
    path = resolve(path)
    manifest = read_manifest(path)
    content = {name: _read_verified(path, name, manifest) for name in manifest["files"] if name != "objects.pkl"}
    objects: dict[str, Any] | None = None
    if weights_only is False:
        objects = {}
        if "objects.pkl" in manifest["files"]:
            pickled = pickle.loads(_read_verified(path, "objects.pkl", manifest))
            objects = {key: pickle.loads(value) for key, value in pickled.items()}

    def tensors(name: str) -> dict[str, Tensor]:
        return _read_tensors(content[name], map_location) if name in content else {}

    def state(name: str, beside: dict[str, Tensor]) -> Any:
        return decode(json.loads(content[f"{name}.json"]), {**tensors(f"{name}.safetensors"), **beside}, objects)

    checkpoint: dict[str, Any] = state("state", tensors("optimizer/optimizer.safetensors"))
    checkpoint["state_dict"] = {**tensors("model/model.safetensors"), **checkpoint.pop("model_extra_state", {})}
    ranks = sum(name.startswith("rng/") and name.endswith(".json") for name in content)
    checkpoint["rng"] = [state(f"rng/rank-{rank}", {}) for rank in range(ranks)]
    checkpoint["manifest"] = manifest
    return checkpoint


def _read_tensors(content: bytes, map_location: Any) -> dict[str, Tensor]:
    from safetensors.torch import load

    tensors = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for alias, name in json.loads(header.get("__metadata__", {}).get("aliases", "{}")).items():
        tensors[alias] = tensors[name]
    return {name: tensor.to(map_location or "cpu") for name, tensor in tensors.items()}


def find_checkpoints(directory: str) -> list[str]:
    """The complete checkpoints in a directory and its folders, the one written last first."""
    if not exists(directory):
        return []
    if is_local(directory):
        folders = [folder for folder, _, files in os.walk(directory) if MANIFEST in files]
    else:
        filesystem = _filesystem(directory)
        root = filesystem._strip_protocol(directory)
        manifests = [name for name in filesystem.find(directory) if name.endswith("/" + MANIFEST)]
        folders = [join(directory, n.removesuffix("/" + MANIFEST)[len(root) :].lstrip("/")) for n in manifests]
    found = []
    for path in folders:
        parent, name = path.rpartition("/")[::2]
        # One moved aside counts only while nothing has taken its place.
        if name.startswith(".") and (not name.endswith(".old") or exists(join(parent, name[1:-13]))):
            continue
        try:
            found.append((read_manifest(path)["created"], path))
        except CheckpointError:
            continue
    return [path for _, path in sorted(found, reverse=True)]
