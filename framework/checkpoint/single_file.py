"""A checkpoint in one file, in torch's own format, for programs that know nothing of this one.

At its top are the keys that Lightning's checkpoints have, and those that users' hooks have put there. What else a
checkpoint holds is under :data:`OURS`. All of it is tensors and plain values, so that torch opens it with
``weights_only=True``: a value of another type is there as the plain value it has, and its type is noted by its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...strategies.optimizer_state import name_states, number_states
from .configs import AttributeDict
from .manifest import FORMAT, seal_in_file
from .schema import Checkpoint
from .serialization import DICTS, PLAIN_DICTS, State, decode, encode
from .tensors import is_usual, memory_of
from .writer import pickle_objects
from .zip_comment import save_commented

# The key at the top that holds what other programs do not know.
OURS = "loopwright"
# The keys of a checkpoint that Lightning's have, too.
_SHARED = (
    "epoch",
    "global_step",
    "state_dict",
    "weight_sets",
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "hyper_parameters",
    "datamodule_hyper_parameters",
)
# What has no meaning for other programs; the last ones are beside what the schema names.
_OWN = (
    *(Checkpoint.__annotations__.keys() - {*_SHARED}),
    "optimizer_parameters",
    "hyper_parameters_call",
    "datamodule_hyper_parameters_call",
)
# Of which version the keys at the top are, for programs that ask.
_LIKE = {"pytorch-lightning_version": "2.6.0"}
# Where a value stands: keys of dicts and positions in lists, from the top.
_Place = tuple[Any, ...]


class FileSnapshot:
    """A checkpoint's content, ready to be written into one file; arguments as of :class:`~.writer.Snapshot`."""

    def __init__(
        self,
        checkpoint: State,
        facts: State,
        rng: list[Any] | None,
        copy: bool,
    ) -> None:
        if OURS in checkpoint:
            raise ValueError(
                f"on_save_checkpoint has put something under {OURS!r}, the key for what this program needs; use another"
            )
        self._body = _through_json(
            {"format": FORMAT, "torch": torch.__version__, **facts}
        )
        whole = dict(checkpoint)
        number_states(whole)
        tensors = {}
        objects = {}
        encoded = {
            key: encode(value, str(key), tensors, objects)
            for key, value in {**whole, "rng": rng or []}.items()
        }
        plain = _Plain(tensors, copy)
        content = {
            key: plain.of(_through_json(value), (key,))
            for key, value in encoded.items()
        }
        ours = {key: content.pop(key) for key in _OWN if key in content}
        ours |= {
            "manifest": self._body,
            "types": plain.types,
            "tensors": plain.left,
            "objects": pickle_objects(objects, "kept in the file as a pickle"),
        }
        for of in ("", "datamodule_"):
            call = checkpoint.get(f"{of}hyper_parameters_call")
            if call:
                # Lightning asks for the argument that holds all of them; this word says that each is an argument.
                whole = call["whole"] or ["kwargs"]
                content[f"{of}hparams_name"] = whole[0]
        self._content = {**_LIKE, **content, OURS: ours}

    def write(self, file: Any) -> None:
        """Write it to an open file."""
        save_commented(
            self._content,
            file,
            lambda size, crc32: seal_in_file(self._body, size, crc32),
        )


def _through_json(value: Any) -> Any:
    """The same without classes that extend plain ones, which JSON cannot tell from these, and torch does not load."""
    return json.loads(json.dumps(value))


def _staged(tensors: Mapping[str, Tensor], copy: bool) -> dict[str, Tensor]:
    """Tensors in the host's memory, each with memory of its own unless it is another one's by another name.

    Args:
        tensors: by name.
        copy: copy those, too, that are in the host's memory by themselves.
    """
    staged = {}
    by_memory: dict[Any, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().as_subclass(Tensor)
        if not is_usual(tensor.dtype):
            tensor = tensor.resolve_conj().unsqueeze(-1).view(torch.uint8)
        key = memory_of(tensor) if tensor.numel() else name
        if key not in by_memory:
            size = tensor.numel() * tensor.element_size()
            # torch would write all of the memory that it is a part of.
            is_alone = tensor.untyped_storage().nbytes() == size
            if copy or tensor.device.type != "cpu" or not is_alone:
                tensor = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
            by_memory[key] = tensor
        staged[name] = by_memory[key]
    return staged


class _Plain:
    """Turns JSON, as of :mod:`.serialization`, into tensors and plain values.

    Args:
        tensors: by the names that they have in the JSON.
        copy: whether to copy them.

    Attributes:
        tensors: as they are written.
        types: by place, what :class:`_Typed` is to do with a plain value, in this order: a tag, and an object's name.
        left: the tensors of what stays JSON.
    """

    def __init__(self, tensors: dict[str, Tensor], copy: bool) -> None:
        self.tensors = _staged(tensors, copy)
        self._unusual = {
            name: str(tensor.dtype).removeprefix("torch.")
            for name, tensor in tensors.items()
            if not is_usual(tensor.dtype)
        }
        self.types: dict[_Place, list[tuple[str, str]]] = {}
        self.left: dict[str, Tensor] = {}

    def of(self, value: Any, place: _Place) -> Any:
        """The plain value of what stands at a place; the JSON with its tag if there is none."""
        if isinstance(value, list):
            return [self.of(item, (*place, i)) for i, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        tag = next(iter(value), "")
        if not tag.startswith("$"):
            return {key: self.of(item, (*place, key)) for key, item in value.items()}
        return self._tagged(value, tag, place)

    def _tagged(self, value: State, tag: str, place: _Place) -> Any:
        """The plain value of JSON with a tag, which is that of a type that torch opens, or is noted."""
        content = value[tag]
        is_usual_tensor = tag == "$tensor" and content not in self._unusual
        if is_usual_tensor or tag in ("$size", "$dtype", "$device"):
            return decode(value, self.tensors, None)
        if tag == "$tuple":
            return tuple(self.of(content, place))
        if tag == "$items" and all(_is_plain_key(key) for key, _ in content):
            keys = [decode(key, {}, None) for key, _ in content]
            items = zip(keys, content, strict=True)
            return {key: self.of(item, (*place, key)) for key, (_, item) in items}
        if tag == "$dict" and content in PLAIN_DICTS:
            return DICTS[content](self.of(value["$value"], place))
        return self._typed(value, tag, place)

    def _typed(self, value: State, tag: str, place: _Place) -> Any:
        """The plain value of what has a type of its own, which is noted."""
        content = value[tag]
        key = ""
        if tag in ("$array", "$tensor"):
            plain = self.tensors[content]
            key = self._unusual.get(content, "")
        elif tag == "$dict":
            plain = self.of(value["$value"], place)
        elif tag == "$object" and "$plain" in value:
            plain = self.of(value["$plain"], place)
            key = content
        elif tag in ("$path", "$timedelta"):
            plain = content
        else:
            self._leave(value)
            return value
        self.types.setdefault(place, []).append((tag, key))
        return plain

    def _leave(self, value: Any) -> None:
        """Keep the tensors that JSON names."""
        if isinstance(value, dict):
            for tag, content in value.items():
                if tag in ("$tensor", "$array"):
                    self.left[content] = self.tensors[content]
                self._leave(content)
        elif isinstance(value, list):
            for item in value:
                self._leave(item)


def _is_plain_key(key: Any) -> bool:
    """Whether the JSON of a dict's key is a plain value, which no reader takes for a tag."""
    if isinstance(key, dict):
        return "$tuple" in key and all(map(_is_plain_key, key["$tuple"]))
    return not (isinstance(key, str) and key.startswith("$"))


def unpack(content: State, objects: State | None) -> State:
    """The checkpoint that a file holds, with its types; it may have been changed, and saved again by ``torch.save``.

    Args:
        content: what torch has read.
        objects: those that were pickled, by name, if they are to be loaded.
    """
    checkpoint = with_types(content, objects)
    name_states(checkpoint)
    return {**checkpoint, "manifest": content[OURS]["manifest"]}


def with_types(content: State, objects: State | None) -> State:
    """All values of a file by their keys, with their types and objects; arguments as of :func:`unpack`."""
    ours = content[OURS]
    typed = _Typed(ours["types"], ours["tensors"], objects)
    apart = ("types", "tensors", "objects", "manifest")
    whole = {**content, **ours}
    return {
        key: typed.of(value, (key,))
        for key, value in whole.items()
        if key not in (OURS, *apart)
    }


class _Typed:
    """Undoes what :class:`_Plain` does; arguments as its attributes, and objects as of :func:`unpack`."""

    def __init__(
        self,
        types: dict[_Place, list[tuple[str, str]]],
        left: dict[str, Tensor],
        objects: State | None,
    ) -> None:
        self.types = types
        self.left = left
        self.objects = objects

    def of(self, value: Any, place: _Place) -> Any:
        """What stood at a place."""
        kind = type(value)
        if kind in (list, tuple):
            value = kind(self.of(item, (*place, i)) for i, item in enumerate(value))
        elif isinstance(value, dict):
            first = next(iter(value), None)
            if isinstance(first, str) and first.startswith("$"):
                return decode(value, self.left, self.objects)
            items = {key: self.of(item, (*place, key)) for key, item in value.items()}
            value = items if kind is dict else kind(items)
        for tag, key in self.types.get(place, ()):
            value = self._typed(value, tag, key)
        return value

    def _typed(self, value: Any, tag: str, key: str) -> Any:
        if tag == "$array":
            return value.cpu().numpy()
        if tag == "$tensor":
            return value.view(getattr(torch, key)).squeeze(-1)
        if tag == "$dict":
            return AttributeDict(value)
        if tag == "$object":
            opened = decode({tag: key, "$plain": None}, {}, self.objects)
            return value if opened is None else opened
        return decode({tag: value}, {}, None)
