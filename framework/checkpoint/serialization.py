"""Nested state as JSON, with its tensors beside it and, apart from both, what is neither.

JSON takes None, bools, numbers, strings, lists and dicts with string keys as they are. Everything else becomes a dict
with a key that begins with ``$``: ``{"$tensor": key}`` names a tensor of a safetensors file, ``{"$object": key}`` an
entry of the pickle, ``{"$tuple": [...]}`` and the like keep a container's type. Where an object's class extends a plain
one, such as an enum of strings, its plain value stands beside: ``{"$object": key, "$plain": "fast"}``.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

from ..messages import log
from .configs import AttributeDict
from .tensors import is_name, is_plain, printable

_DTYPES = {
    name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_PLAIN = (bool, int, float, str)
_CONTAINERS: dict[str, type] = {
    kind.__name__: kind for kind in (Counter, OrderedDict, AttributeDict)
}


class SealedObject:
    """Stands for an object that was pickled and not loaded. Any use of it raises, naming it and the way out."""

    def __init__(self, key: str, reason: str) -> None:
        self.__dict__.update(_key=key, _reason=reason)

    def _error(self) -> Exception:
        from ..errors import CheckpointError

        return CheckpointError(f"the checkpoint's {self._key!r} {self._reason}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python probes for when copying or printing
            raise AttributeError(name)
        raise self._error()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise."""
        raise self._error()

    def __repr__(self) -> str:
        return f"<not loaded: {self._key}>"


def find_sealed(value: Any) -> SealedObject | None:
    """The first object inside ``value`` that was not loaded."""
    if isinstance(value, SealedObject):
        return value
    children = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, (list, tuple))
        else ()
    )
    return next(
        (found for child in children if (found := find_sealed(child)) is not None), None
    )


def require_unsealed(value: Any) -> None:
    """Raise the error of the first object inside ``value`` that was not loaded, if there is one."""
    if (sealed := find_sealed(value)) is not None:
        raise sealed._error()


_ABSENT = object()


def unseal(state: Any, living: Any) -> Any:
    """``state``, where what ``living``, which it is for, has already stands for each object that was not loaded.

    Raises:
        CheckpointError: if it has nothing in such a place.
    """
    if isinstance(state, SealedObject):
        if living is None or living is _ABSENT:
            raise state._error()
        log.info(
            "The checkpoint's %r is a pickled object and not loaded: what is there, %r, is kept",
            state._key,
            living,
        )
        return living
    if find_sealed(state) is None:
        return state
    if not isinstance(state, dict):
        return [
            unseal(item, own)
            for item, own in zip_longest(state, living, fillvalue=_ABSENT)
        ]
    owned = living if isinstance(living, dict) else getattr(living, "__dict__", {})
    return {key: unseal(value, owned.get(key, _ABSENT)) for key, value in state.items()}


class _Codec(NamedTuple):
    """How values of one kind are written as ``{tag: content}``, and made again from it."""

    tag: str
    kind: type
    to_json: Callable[[Any], Any]
    from_json: Callable[[Any], Any]


_CODECS = (
    _Codec("$size", torch.Size, list, torch.Size),
    _Codec(
        "$dtype",
        torch.dtype,
        lambda dtype: str(dtype).removeprefix("torch."),
        _DTYPES.__getitem__,
    ),
    _Codec("$device", torch.device, str, torch.device),
    _Codec(
        "$timedelta",
        timedelta,
        timedelta.total_seconds,
        lambda seconds: timedelta(seconds=seconds),
    ),
    _Codec("$path", PurePath, str, Path),
)
_FROM_JSON: dict[str, Callable[[Any], Any]] = {
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    "$lazy": lambda kind: (
        UninitializedParameter() if kind == "parameter" else UninitializedBuffer()
    ),
    **{codec.tag: codec.from_json for codec in _CODECS},
}


def encode(
    value: Any, path: str, tensors: dict[str, Tensor], objects: dict[str, Any]
) -> Any:
    """Return ``value`` as JSON; its tensors and other objects go into the dicts, under the paths where they stand."""
    if value is None or type(value) in _PLAIN:
        return value
    path = printable(path)
    while path in tensors or path in objects or not is_name(path):
        path += "'"  # {"a": {"b": x}, "a.b": y} gives one path twice
    if is_plain(value):
        tensors[path] = value
        return {"$tensor": path}
    if is_lazy(
        value
    ):  # without a size or value yet: its kind is all that a module takes back
        return {
            "$lazy": "parameter"
            if isinstance(value, UninitializedParameter)
            else "buffer"
        }
    if isinstance(value, dict) and has_plain(value):
        return _encode_dict(value, path, tensors, objects)
    for codec in _CODECS:
        if isinstance(value, codec.kind):
            return {codec.tag: codec.to_json(value)}
    if type(value) in (list, tuple, set, frozenset):
        return _encode_sequence(value, path, tensors, objects)
    if type(value).__module__ == "numpy":
        return _encode_numpy(value, path, tensors, objects)
    return _encode_object(value, path, objects)


def _encode_sequence(
    value: Any, path: str, tensors: dict[str, Tensor], objects: dict[str, Any]
) -> Any:
    kind = type(value)
    if kind in (set, frozenset):
        if not all(isinstance(item, (str, int)) for item in value):
            return _encode_object(value, path, objects)
        value = sorted(value, key=json.dumps)  # an enum's item as its value
    items = [
        encode(item, f"{path}.{i}", tensors, objects) for i, item in enumerate(value)
    ]
    return items if kind is list else {f"${kind.__name__}": items}


def _encode_object(value: Any, path: str, objects: dict[str, Any]) -> dict[str, Any]:
    objects[path] = value
    # JSON writes what such a value holds, whatever its class says that it is.
    return {"$object": path, "$plain": value} if has_plain(value) else {"$object": path}


def has_plain(value: Any) -> bool:
    """Whether an object that is pickled also has a plain value, for who does not load pickled objects."""
    return isinstance(value, (str, int, float, dict)) and not isinstance(
        value, defaultdict
    )


def _encode_dict(
    value: dict[Any, Any],
    path: str,
    tensors: dict[str, Tensor],
    objects: dict[str, Any],
) -> Any:
    known = len(tensors)
    if all(type(key) is str and not key.startswith("$") for key in value):
        encoded: Any = {
            key: encode(item, f"{path}.{key}", tensors, objects)
            for key, item in value.items()
        }
    else:
        items = [
            [
                encode(key, f"{path}.key{i}", tensors, objects),
                encode(item, f"{path}.{key}", tensors, objects),
            ]
            for i, (key, item) in enumerate(value.items())
        ]
        encoded = {"$items": items}
    kind = type(value)
    if kind is dict:
        return encoded
    if kind in _CONTAINERS.values():
        return {"$dict": kind.__name__, "$value": encoded}
    # Of a class that is not known here, the keys may be attributes.
    encoded = {"$dict": "AttributeDict", "$value": encoded}
    if len(tensors) > known:
        return encoded  # they would be written twice
    objects[path] = value
    return {"$object": path, "$plain": encoded}


def _encode_numpy(
    value: Any, path: str, tensors: dict[str, Tensor], objects: dict[str, Any]
) -> Any:
    import numpy as np

    if type(value) is np.ndarray:
        with suppress(
            TypeError
        ):  # of what torch has no type for, such as strings, dates or objects
            tensors[path] = torch.from_numpy(
                value.astype(value.dtype.newbyteorder("="), order="C")
            )
            return {"$array": path}
    # By the kind, as a date's item may be an int; and by the item, as a long double's is itself.
    elif (
        isinstance(value, np.generic)
        and value.dtype.kind in "biufU"
        and type(value.item()) in _PLAIN
    ):
        return value.item()
    return _encode_object(value, path, objects)


def decode(
    value: Any, tensors: dict[str, Tensor], objects: dict[str, Any] | None
) -> Any:
    """The inverse of :func:`encode`; without ``objects``, a :class:`SealedObject` stands for each of them."""
    if isinstance(value, list):
        return [decode(item, tensors, objects) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: decode(item, tensors, objects) for key, item in value.items()}
    content = value[tag]
    if tag == "$tensor":
        return tensors[content]
    if tag == "$array":
        return tensors[content].cpu().numpy()
    if tag == "$object":
        found = _open_object(content, objects)
        if "$plain" not in value or not isinstance(found, SealedObject):
            return found
        if objects is not None:
            log.warning(
                "The checkpoint's %r %s; its plain value is taken",
                content,
                found._reason,
            )
        return decode(value["$plain"], tensors, objects)
    if tag == "$items":
        return {
            decode(key, tensors, objects): decode(item, tensors, objects)
            for key, item in content
        }
    if tag == "$dict":
        return _CONTAINERS[content](decode(value["$value"], tensors, objects))
    return _FROM_JSON[tag](decode(content, tensors, objects))


def _open_object(key: str, objects: dict[str, Any] | None) -> Any:
    if objects is None:
        return SealedObject(
            key,
            "is a pickled object, which can run code; pass weights_only=False if you trust it",
        )
    if key not in objects:
        return SealedObject(key, "could not be pickled when the checkpoint was saved")
    return objects[key]
