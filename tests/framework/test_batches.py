"""Batches of all kinds: read without being rebuilt, and changed with all that they hold."""

from __future__ import annotations

import copy
from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from loopwright.framework import Module
from loopwright.framework.data.batches import (
    batch_size_of,
    cast_batch,
    map_tensors,
)
from loopwright.framework.data.device_input import move_batch
from tests.samples import as_dataset
from tests.strategies.distributed import quiet


@dataclass
class Derived:
    x: Tensor
    factor: InitVar[float]
    total: Tensor = field(init=False)
    note: str = "made"

    def __post_init__(self, factor: float) -> None:
        self.x = self.x * factor
        self.total = self.x.sum()

    @cached_property
    def mask(self) -> Tensor:
        return self.x > 0


def derived(x: Tensor) -> Derived:
    batch = Derived(x, 2.0)
    batch.x, batch.total, batch.note = x, torch.tensor(-1.0), "set later"
    assert batch.mask.all()
    return batch


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    names: tuple[str, ...] = ("a", "b")


@dataclass
class Locked:
    """Immutable in its own way."""

    x: Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(self, "x"):
            raise AttributeError("locked")
        super().__setattr__(name, value)


@dataclass
class MovesItself:
    x: Tensor
    moved: bool = False

    def to(self, device: Any) -> MovesItself:
        return MovesItself(self.x.to(device), True)


class Sized(NamedTuple("Sized", [("x", Tensor), ("size", int)])):
    def __new__(cls, x: Tensor) -> Sized:
        made = super().__new__(cls, x, len(x))
        made.tag = "new"
        return made

    tag: str


class Tagged(list):
    def __init__(self, items: Any, tag: str) -> None:
        super().__init__(items)
        self.tag = tag


class Keywords(dict):
    def __init__(self, *, x: Tensor) -> None:
        super().__init__(x=x)


class Items(Mapping):
    """A mapping that cannot be changed."""

    def __init__(self, items: Any) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Named(Items):
    """One that its constructor would not make again as it is."""

    def __init__(self, items: Any, name: str = "") -> None:
        super().__init__(items)
        self.name = name


class Changeable(Items, MutableMapping):
    def __setitem__(self, key: str, value: Any) -> None:
        self._items[key] = value

    def __delitem__(self, key: str) -> None:
        del self._items[key]


class Encoding(UserDict):
    """As a tokenizer gives it: with a method that moves it, and more than its items."""

    def __init__(self, data: Any, encodings: Any = None) -> None:
        super().__init__(data)
        self.encodings = encodings

    def to(self, device: Any) -> Encoding:
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


def of_key(batch: Any) -> Tensor:
    return batch["x"]


def of_name(batch: Any) -> Tensor:
    return batch.x


def first(batch: Any) -> Tensor:
    return batch[0]


# How to make a batch of a tensor, where it is in there, and what else must be as it was.
KINDS: dict[
    str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], Callable[[Any], bool]]
] = {
    "derived": (
        derived,
        of_name,
        lambda b: b.note == "set later" and float(b.total.sum()) == -1.0,
    ),
    "frozen": (Frozen, of_name, lambda b: b.names == ("a", "b")),
    "locked": (Locked, of_name, lambda b: True),
    "named tuple": (Sized, of_name, lambda b: b.size == 2 and b.tag == "new"),
    "list": (lambda x: Tagged([x], "t"), first, lambda b: b.tag == "t"),
    "user list": (lambda x: UserList([x]), first, lambda b: True),
    "deque": (lambda x: deque([x], maxlen=3), first, lambda b: b.maxlen == 3),
    "keywords": (lambda x: Keywords(x=x), of_key, lambda b: True),
    "ordered": (lambda x: OrderedDict(x=x), of_key, lambda b: True),
    "default": (
        lambda x: defaultdict(list, x=x),
        of_key,
        lambda b: b.default_factory is list,
    ),
    "chain": (lambda x: ChainMap({}, {"x": x}), of_key, lambda b: True),
    "proxy": (lambda x: MappingProxyType({"x": x}), of_key, lambda b: True),
    "items": (lambda x: Items({"x": x}), of_key, lambda b: True),
    "changeable": (lambda x: Changeable({"x": x}), of_key, lambda b: True),
    "encoding": (
        lambda x: Encoding({"x": x}, ["e"]),
        of_key,
        lambda b: b.encodings == ["e"],
    ),
    "maximum": (
        lambda x: torch.return_types.max((x, x)),
        lambda b: b.values,
        lambda b: True,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_changed_in_a_copy_and_keeps_what_else_it_holds(kind: str):
    make, get, is_as_it_was = KINDS[kind]
    x = torch.ones(2, 3)
    batch = make(x)
    assert batch_size_of(batch) == 2
    moved, cast = (
        move_batch(batch, torch.device("meta")),
        cast_batch(batch, torch.bfloat16),
    )
    assert get(moved).is_meta
    assert torch.equal(get(cast), x.bfloat16())
    assert get(cast).dtype == torch.bfloat16
    assert type(moved) is type(cast) is type(batch)
    assert get(batch) is x
    assert is_as_it_was(cast)
    assert is_as_it_was(batch)


def test_what_a_dataclass_has_beside_its_fields_is_moved_too():
    assert move_batch(derived(torch.ones(2)), torch.device("meta")).mask.is_meta


def test_an_object_is_moved_by_its_own_method_and_a_mapping_by_its_items():
    meta = torch.device("meta")
    assert move_batch(MovesItself(torch.ones(2)), meta).moved
    nested = Encoding({"x": torch.ones(2), "more": {"y": [torch.ones(2)]}})
    assert move_batch(nested, meta)["more"]["y"][0].is_meta
    packed = pack_sequence([torch.ones(3, 1), torch.ones(1, 1)])
    moved = move_batch({"packed": packed}, meta)["packed"]
    assert moved.data.is_meta
    assert moved.batch_sizes.device.type == "cpu"
    assert cast_batch(packed, torch.bfloat16).data.dtype == torch.bfloat16
    assert batch_size_of([packed, torch.ones(2)]) == 2


def test_an_object_that_is_moved_in_place_is_kept():
    class InPlace(MovesItself):
        def to(self, device: torch.device) -> None:  # it gives nothing back
            self.x = self.x.to(device)

    batch = InPlace(torch.ones(2))
    moved = move_batch({"x": [batch]}, torch.device("meta"))
    assert moved["x"][0] is batch
    assert batch.x.is_meta


def test_what_cannot_be_copied_is_passed_on_or_refused_by_name():
    batch = Named({"x": torch.ones(2), "more": [torch.ones(2)]}, "its name")
    assert move_batch(batch, torch.device("cpu")) is batch
    with pytest.raises(
        TypeError, match="a Named in a batch cannot be copied with other tensors"
    ):
        cast_batch(batch, torch.bfloat16)

    class Doubling(dict):
        """Takes other values than it is given, when it is changed and when it is made."""

        def __init__(self, items: Any = ()) -> None:
            super().__init__({key: value * 2 for key, value in dict(items).items()})

        def __setitem__(self, key: str, value: Any) -> None:
            super().__setitem__(key, value * 2)

    with pytest.raises(TypeError, match="a Doubling in a batch cannot be copied"):
        map_tensors(Doubling({"x": torch.ones(2)}), torch.neg)


def test_the_size_of_graphs_is_what_they_say():
    class Graphs:
        batch_size = 3

    assert batch_size_of([Graphs(), "text"]) == 3
    assert batch_size_of({"graphs": Graphs(), "x": torch.ones(2)}) == 2
    with pytest.raises(ValueError, match="no tensor with a dimension"):
        batch_size_of(["text", torch.tensor(1.0)])


class Net(Module):
    def __init__(
        self, get: Callable[[Any], Tensor], check: Callable[[Any], bool]
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.get, self.check = get, check
        self.sizes: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.check(batch)
        self.sizes.append(len(self.get(batch)))
        return self.layer(self.get(batch)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self.check(batch)
        self.log("mean", self.get(batch).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    "kind", ["derived", "named tuple", "list", "keywords", "encoding"]
)
@pytest.mark.parametrize(
    "options", [{}, {"precision": "bf16-true"}, {"micro_batch": 2}]
)
def test_a_run_reads_batches_of_any_kind(kind: str, options: dict[str, Any]):
    make, get, check = KINDS[kind]
    if kind == "named tuple":
        check = lambda batch: batch.tag == "new"  # noqa: E731 # its size is the whole batch's
    rows = [torch.tensor([float(i)]) for i in range(1, 11)]
    batches = [make(torch.stack(rows[i : i + 4])) for i in range(0, 10, 4)]
    model = Net(get, check)
    trainer = quiet(num_sanity_val_steps=0, **options)
    trainer.fit(
        model,
        batches,
        DataLoader(
            as_dataset(rows),
            batch_size=4,
            collate_fn=lambda chosen: make(torch.stack(chosen)),
        ),
    )
    assert float(trainer.callback_metrics["mean"]) == 5.5
    assert model.sizes == ([2] * 5 if "micro_batch" in options else [4, 4, 2])
    assert get(batches[0]).dtype == torch.float32


def test_batches_of_transformers():
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"x": torch.ones(2), "ids": torch.arange(2)})
    features = transformers.BatchFeature({"x": torch.ones(2), "ids": torch.arange(2)})
    for given in (batch, features):
        moved = cast_batch(
            move_batch(copy.copy(given), torch.device("cpu")), torch.bfloat16
        )
        assert type(moved) is type(given)
        assert moved["x"].dtype == torch.bfloat16
        assert moved["ids"].dtype == torch.int64
        assert given["x"].dtype == torch.float32
    output = transformers.modeling_outputs.CausalLMOutput(
        loss=torch.tensor(1.0), logits=torch.ones(2)
    )
    cast = cast_batch(output, torch.bfloat16)
    assert cast.logits is cast["logits"]
    assert cast.logits.dtype == torch.bfloat16
