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
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ...strategies.stored_tensors import StoredState, StoredTensor, stored_items
from ..errors import CheckpointError
from ..messages import log
from .configs import AttributeDict
from .tensors import is_name, is_storable, printable

# Values by name, nested as users may nest them: what a `state_dict` gives.
State = dict[str, Any]
_PLAIN = (bool, int, float, str)
# Classes of dicts that are kept, by name.
DICTS: dict[str, type] = {
    kind.__name__: kind for kind in (Counter, OrderedDict, AttributeDict)
}
# Those of Python's own, which torch loads with ``weights_only=True``.
PLAIN_DICTS = ("Counter", "OrderedDict")


class _Codec(NamedTuple):
    """How values of one kind are written as ``{tag: content}``, and made again from it."""

    tag: str
    kind: type
    to_json: Callable[[Any], Any]
    from_json: Callable[[Any], Any]


_DTYPES = {str(x): x for x in vars(torch).values() if isinstance(x, torch.dtype)}
# Parameters and buffers without a size or value yet: their kind is all that a module takes back.
_LAZY = {"parameter": UninitializedParameter, "buffer": UninitializedBuffer}
_CODECS = (
    _Codec("$size", torch.Size, list, torch.Size),
    _Codec(
        "$dtype",
        torch.dtype,
        lambda dtype: str(dtype)[6:],
        lambda name: _DTYPES[f"torch.{name}"],
    ),
    _Codec("$device", torch.device, str, torch.device),
    _Codec(
        "$timedelta",
        timedelta,
        timedelta.total_seconds,
        lambda seconds: timedelta(seconds=seconds),
    ),
    _Codec("$path", PurePath, str, Path),
    _Codec(
        "$lazy",
        UninitializedParameter,
        lambda _: "parameter",
        lambda kind: _LAZY[kind](),
    ),
    _Codec(
        "$lazy", UninitializedBuffer, lambda _: "buffer", lambda kind: _LAZY[kind]()
    ),
)
# How a value is made from its content, decoded, by tag.
_FROM_CONTENT: dict[str, Callable[[Any], Any]] = {
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    **{codec.tag: codec.from_json for codec in _CODECS},
}


def encode(
    value: Any,
    path: str,
    tensors: dict[str, Tensor],
    objects: State,
) -> Any:
    """Return a value as JSON.

    Args:
        value: what to write.
        path: where the value stands in the checkpoint, such as ``callbacks.EarlyStopping``; its tensors and objects are
            named by their paths.
        tensors: its tensors are put in here, by path.
        objects: what is neither a tensor nor JSON is put in here, by path.
    """
    return _Encoder(tensors, objects).encode(value, path)


class _Encoder:
    """Collects the tensors and objects of what it turns into JSON."""

    def __init__(
        self,
        tensors: dict[str, Tensor],
        objects: State,
    ) -> None:
        self.tensors = tensors
        self.objects = objects

    def encode(
        self,
        value: Any,
        path: str,
    ) -> Any:
        """A value as JSON."""
        if value is None or type(value) in _PLAIN:
            return value
        path = self._free(path)
        if is_storable(value):
            self.tensors[path] = value
            return {"$tensor": path}
        if isinstance(value, dict) and has_plain_value(value):
            return self._encode_dict(value, path)
        for codec in _CODECS:
            if isinstance(value, codec.kind):
                return {codec.tag: codec.to_json(value)}
        kind = type(value)
        if kind in (list, tuple):
            return self._encode_items(value, path)
        # Items of sets need an order; an enum's item is ordered by its value.
        if kind in (set, frozenset) and all(
            isinstance(item, (str, int)) for item in value
        ):
            return self._encode_items(sorted(value, key=json.dumps), path, kind)
        if kind.__module__ == "numpy":
            return self._encode_numpy(value, path)
        return self._encode_object(value, path)

    def _free(self, path: str) -> str:
        """A name like ``path`` that nothing has yet, as ``{"a": {"b": x}, "a.b": y}`` gives the path ``a.b`` twice."""
        path = printable(path)
        while path in self.tensors or path in self.objects or not is_name(path):
            path += "'"
        return path

    def _encode_items(
        self,
        items: Any,
        path: str,
        kind: type | None = None,
    ) -> Any:
        kind = kind or type(items)
        encoded = [self.encode(item, f"{path}.{i}") for i, item in enumerate(items)]
        return encoded if kind is list else {f"${kind.__name__}": encoded}

    def _encode_dict(
        self,
        value: dict[Any, Any],
        path: str,
    ) -> Any:
        tensors_before = len(self.tensors)
        if all(type(key) is str and not key.startswith("$") for key in value):
            encoded: Any = {
                key: self.encode(item, f"{path}.{key}") for key, item in value.items()
            }
        else:
            items = []
            for i, (key, item) in enumerate(value.items()):
                encoded_key = self.encode(key, f"{path}.key{i}")
                items.append([encoded_key, self.encode(item, f"{path}.{key}")])
            encoded = {"$items": items}
        kind = type(value)
        if kind is dict:
            return encoded
        if kind in DICTS.values():
            return {"$dict": kind.__name__, "$value": encoded}
        # Of a class that is not known here, the keys may be attributes.
        encoded = {"$dict": "AttributeDict", "$value": encoded}
        if len(self.tensors) > tensors_before:
            # The object would hold the tensors a second time.
            return encoded
        self.objects[path] = value
        return {"$object": path, "$plain": encoded}

    def _encode_numpy(
        self,
        value: Any,
        path: str,
    ) -> Any:
        import numpy as np

        if type(value) is np.ndarray:
            native = value.astype(value.dtype.newbyteorder("="), order="C")
            try:
                self.tensors[path] = torch.from_numpy(native)
            except TypeError:
                # torch has no such type, as for strings, dates or objects.
                return self._encode_object(value, path)
            return {"$array": path}
        # The kind of number is looked at, as a date's item may be an int, and the item, as a long double's is itself.
        if isinstance(value, np.generic) and value.dtype.kind in "biufU":
            item = value.item()
            if type(item) in _PLAIN:
                return item
        return self._encode_object(value, path)

    def _encode_object(
        self,
        value: Any,
        path: str,
    ) -> State:
        self.objects[path] = value
        encoded = {"$object": path}
        if has_plain_value(value):
            # JSON writes what such a value holds, whatever its class says that it is.
            encoded["$plain"] = value
        return encoded


def has_plain_value(value: Any) -> bool:
    """Whether an object that is pickled also has a plain value, for readers that do not load pickled objects."""
    kinds = (str, int, float, dict)
    return isinstance(value, kinds) and not isinstance(value, defaultdict)


def decode(
    value: Any,
    tensors: dict[str, Tensor],
    objects: State | None,
) -> Any:
    """The inverse of :func:`encode`; without ``objects``, an :class:`UnloadedObject` stands for each of them.

    A dict whose tensors are in files still is a :class:`~...strategies.stored_tensors.StoredState`.
    """

    def decoded(value: Any) -> Any:
        if isinstance(value, list):
            return [_read(decoded(item)) for item in value]
        if not isinstance(value, dict):
            return value
        tag = next(iter(value), "")
        if not tag.startswith("$"):
            return with_stored({key: decoded(item) for key, item in value.items()})
        content = value[tag]
        if tag == "$tensor":
            return tensors[content]
        if tag == "$array":
            tensor = tensors[content]
            return None if tensor is None else tensor.cpu().numpy()
        if tag == "$object":
            opened = _open_object(content, objects)
            if "$plain" not in value or not isinstance(opened, UnloadedObject):
                return opened
            if objects is not None:
                log.warning(
                    "The checkpoint's %r %s; its plain value is taken",
                    content,
                    opened._reason,
                )
            return decoded(value["$plain"])
        if tag == "$items":
            return with_stored({decoded(key): decoded(item) for key, item in content})
        if tag == "$dict":
            return DICTS[content](decoded(value["$value"]))
        return _FROM_CONTENT[tag](decoded(content))

    return decoded(value)


def _read(value: Any) -> Any:
    """A tensor, if it is in files still."""
    return value.whole() if isinstance(value, StoredTensor) else value


def with_stored(state: State) -> State:
    """A dict that gives tensors where some of its own are in files still; else as it is."""
    is_stored = any(isinstance(value, StoredTensor) for value in state.values())
    return StoredState(state) if is_stored else state


def _open_object(key: str, objects: State | None) -> Any:
    if objects is None:
        return UnloadedObject(
            key,
            "is a pickled object, which can run code; pass weights_only=False if you trust it",
        )
    if key not in objects:
        return UnloadedObject(key, "could not be pickled when the checkpoint was saved")
    return objects[key]


class UnloadedObject:
    """Stands for an object that was pickled and not loaded. Any use of it raises, naming it and the way out."""

    def __init__(
        self,
        key: str,
        reason: str,
    ) -> None:
        self.__dict__.update(_key=key, _reason=reason)

    def _error(self) -> CheckpointError:
        return CheckpointError(f"the checkpoint's {self._key!r} {self._reason}")

    def __getattr__(self, name: str) -> Any:
        # Python probes for such names when copying or printing.
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._error()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise."""
        raise self._error()

    def __repr__(self) -> str:
        return f"<not loaded: {self._key}>"


def find_unloaded(value: Any) -> UnloadedObject | None:
    """The first object inside ``value`` that was not loaded."""
    if isinstance(value, UnloadedObject):
        return value
    if isinstance(value, dict):
        value = list(stored_items(value).values())
    if isinstance(value, (list, tuple)):
        for child in value:
            found = find_unloaded(child)
            if found is not None:
                return found
    return None


def require_loaded(value: Any) -> None:
    """Raise the error of the first object inside ``value`` that was not loaded, if there is one."""
    unloaded = find_unloaded(value)
    if unloaded is not None:
        raise unloaded._error()


_ABSENT = object()


def fill_unloaded(state: Any, owner: Any) -> Any:
    """Replace objects that were not loaded by what ``owner`` has in their places.

    Args:
        state: what a checkpoint holds for ``owner``.
        owner: what will load the state: an object with attributes of these names, or a nesting like the state's.

    Raises:
        CheckpointError: if ``owner`` has nothing in such a place.
    """
    if isinstance(state, UnloadedObject):
        if owner is None or owner is _ABSENT:
            raise state._error()
        log.info(
            "The checkpoint's %r is a pickled object and not loaded: what is there, %r, is kept",
            state._key,
            owner,
        )
        return owner
    if find_unloaded(state) is None:
        return state
    if not isinstance(state, dict):
        pairs = zip_longest(state, owner, fillvalue=_ABSENT)
        return [fill_unloaded(item, present) for item, present in pairs]
    present = owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})
    return {
        key: fill_unloaded(value, present.get(key, _ABSENT))
        for key, value in state.items()
    }
