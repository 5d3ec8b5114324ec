"""Loaders of every kind are iterated from any batch, and what the user gave stays as it was."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import random
import threading
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from loopwright.callbacks import Callback
from loopwright.framework import CombinedLoader, Module
from loopwright.framework.data.combined import CombinedSource, source_of
from loopwright.framework.data.iteration import INFINITE, loader_length
from loopwright.framework.data.position import Segment
from loopwright.framework.loop.loaders import limited
from tests.framework.models import quiet


class Numbers(Dataset[Any]):
    """0 to ``size`` - 1, each as a tensor; with ``augment``, three random numbers beside it. Notes what is read."""

    def __init__(self, size: int = 10, augment: bool = False) -> None:
        self.size, self.augment = size, augment
        self.read: list[int] = []
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        if not self.augment:
            return torch.tensor(float(index))
        return torch.tensor(
            [float(index), torch.rand(()).item(), random.random(), np.random.random()]
        )

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class Stream(IterableDataset[Any]):
    """0 to 9 in a random order drawn where it is read, shared among workers."""

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        numbers = list(range(first, 10, step))
        random.shuffle(numbers)
        return (torch.tensor([float(n), torch.rand(()).item()]) for n in numbers)


class Shuffled(Sampler[int]):
    """A user's sampler: random by torch's, Python's or its own generator."""

    def __init__(self, by: str, size: int = 10) -> None:
        self.by, self.size = by, size
        self.generator = torch.Generator().manual_seed(3) if by == "own" else None

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        if self.by == "python":
            yield from random.sample(range(self.size), self.size)
        for _ in range(self.size if self.by != "python" else 0):
            yield int(torch.randint(self.size, (), generator=self.generator))


class Pairs(Sampler[list[int]]):
    """A batch sampler without a length: random pairs of neighbours."""

    def __iter__(self) -> Iterator[list[int]]:
        for i in torch.randperm(5).tolist():
            yield [2 * i, 2 * i + 1]


class Named(DataLoader[Any]):
    """A loader that cannot be made again from its attributes."""

    def __init__(self, name: str, numbers: Dataset[Any]) -> None:
        super().__init__(numbers, batch_size=2, shuffle=True)
        self.name = name


class Stateful:
    """A loader that keeps its own place, as torchdata's does: six batches of one number, drawn at random."""

    def __init__(self) -> None:
        self.position = 0
        self.resumed = False
        self.generator = torch.Generator().manual_seed(1)

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Any]:
        if not self.resumed:
            self.position = 0
        self.resumed = False
        while self.position < 6:
            self.position += 1
            yield torch.rand(1, generator=self.generator)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        self.generator.set_state(state["generator"])
        self.resumed = True


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


KINDS: dict[str, Callable[[Any], Any]] = {
    "in order": lambda d: DataLoader(d, batch_size=3),
    "shuffled": lambda d: DataLoader(d, batch_size=3, shuffle=True),
    "drop_last": lambda d: DataLoader(d, batch_size=3, shuffle=True, drop_last=True),
    "one by one": lambda d: DataLoader(d),
    "batch_size=None": lambda d: DataLoader(d, batch_size=None),
    "batch_size=None, shuffled": lambda d: DataLoader(d, batch_size=None, shuffle=True),
    "subclass": lambda d: Named("mine", d),
    "RandomSampler(generator)": lambda d: DataLoader(
        d, 3, sampler=RandomSampler(d, generator=seeded())
    ),
    "RandomSampler(replacement)": lambda d: DataLoader(
        d, 3, sampler=RandomSampler(d, replacement=True)
    ),
    "RandomSampler(num_samples)": lambda d: DataLoader(
        d, 3, sampler=RandomSampler(d, num_samples=14)
    ),
    "SubsetRandomSampler": lambda d: DataLoader(
        d, 3, sampler=SubsetRandomSampler(range(3, 10))
    ),
    "WeightedRandomSampler": lambda d: DataLoader(
        d, 3, sampler=WeightedRandomSampler(list(range(10)), 12)
    ),
    "WeightedRandomSampler(generator)": lambda d: DataLoader(
        d, 3, sampler=WeightedRandomSampler(list(range(10)), 12, generator=seeded())
    ),
    "generator of the loader": lambda d: DataLoader(
        d, 3, shuffle=True, generator=seeded()
    ),
    "own sampler": lambda d: DataLoader(d, 3, sampler=Shuffled("torch")),
    "own sampler, random": lambda d: DataLoader(d, 3, sampler=Shuffled("python")),
    "own sampler, generator": lambda d: DataLoader(d, 3, sampler=Shuffled("own")),
    "own sampler, batch_size=None": lambda d: DataLoader(
        d, batch_size=None, sampler=Shuffled("torch")
    ),
    "BatchSampler": lambda d: DataLoader(
        d, batch_sampler=BatchSampler(SequentialSampler(d), 4, False)
    ),
    "BatchSampler of one's own": lambda d: DataLoader(
        d, batch_sampler=BatchSampler(Shuffled("own"), 3, True)
    ),
    "batch sampler of one's own": lambda d: DataLoader(d, batch_sampler=Pairs()),
    "iterable dataset": lambda d: DataLoader(Stream(), batch_size=2),
    "list of batches": lambda d: [torch.tensor([float(i)]) for i in range(5)],
    "loader of one's own": lambda d: IterableOnly(),
}


class IterableOnly:
    """Nothing but __iter__."""

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.rand(5))


def numbers_of(batches: Any) -> list[list[float]]:
    """Batches as plain lists."""
    return [torch.as_tensor(batch).flatten().tolist() for batch in batches]


@pytest.mark.parametrize("kind", KINDS)
def test_iterating_from_any_batch(kind: str) -> None:
    """The rest of an epoch is the same, wherever it is begun, whatever was drawn or iterated before."""
    make = KINDS[kind]
    whole = {
        epoch: numbers_of(source_of(make(Numbers()), seed=1).iterate(epoch))
        for epoch in range(2)
    }
    assert len(whole[0]) >= 3
    torch.manual_seed(99)
    random.seed(99)
    used = source_of(make(Numbers()), seed=1)
    for epoch, start in ((1, 2), (0, 0), (1, 1), (0, 3)):
        before = torch.get_rng_state(), random.getstate()
        batches = list(used.iterate(epoch, start))
        assert numbers_of(batches) == whole[epoch][start:], (epoch, start)
        if isinstance(used.loader, DataLoader) and not isinstance(
            used.loader.dataset, IterableDataset
        ):
            continue  # torch draws a base seed for each iterator of it
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]


FIXED = ("in order", "one by one", "batch_size=None", "BatchSampler", "list of batches")
BY_THEIR_OWN_GENERATOR = (
    "own sampler, generator",
    "BatchSampler of one's own",
    "WeightedRandomSampler(generator)",
)


@pytest.mark.parametrize("kind", [*KINDS, "combined"])
def test_a_part_of_an_epoch_ends_where_it_is_to_end(kind: str) -> None:
    """What is cut in batches or samples ends there, also where the loader has no length that says so."""
    plain: Callable[[Any], list[Any]] = numbers_of
    if kind == "combined":
        loader: Any = source_of(
            CombinedLoader(
                [DataLoader(Stream(), batch_size=2), range(7)], "max_size_cycle"
            ),
            0,
        )
        plain = lambda batches: [numbers_of(batch) for batch in batches]  # noqa: E731 # one line beside the other
    else:
        loader = source_of(KINDS[kind](Numbers()), 0)
    whole = plain(loader.iterate(3))
    assert len(whole) > 2
    segment = Segment(begin=loader.unit, end=(len(whole) - 1) * loader.unit)
    for start, step in ((0, 1), (1, 1), (0, 2), (1, 2), (2, 1), (3, 2)):
        batches = loader.iterate(3, start, step, segment)
        assert plain(batches) == whole[1:-1][start::step]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FIXED])
def test_orders_differ_by_epoch_and_seed(kind: str) -> None:
    """What is random has another order in each epoch and, unless the user seeded it, for each seed."""
    make = KINDS[kind]
    first, later, other = (
        numbers_of(source_of(make(Numbers()), seed).iterate(epoch))
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    )
    assert first != later
    assert (first == other) is (kind in BY_THEIR_OWN_GENERATOR)


def flat(batches: list[list[float]]) -> list[float]:
    return [number for batch in batches for number in batch]


def test_shuffling_is_a_permutation() -> None:
    """Each sample once an epoch."""
    loader = source_of(DataLoader(Numbers(), batch_size=3, shuffle=True), seed=1)
    for epoch in range(3):
        assert sorted(flat(numbers_of(loader.iterate(epoch)))) == list(range(10))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_have_the_sizes_that_torch_gives(kind: str) -> None:
    """As many, and as large, as when the loader is iterated by itself; drop_last drops."""
    mine, torchs = (
        list(source_of(KINDS[kind](Numbers()), seed=1).iterate(0)),
        list(KINDS[kind](Numbers())),
    )
    assert [batch.shape for batch in mine] == [batch.shape for batch in torchs]


def test_sampling_with_replacement() -> None:
    """Repeats samples; and a RandomSampler's own seed counts."""
    numbers = Numbers(100)
    loader = DataLoader(numbers, 100, sampler=RandomSampler(numbers, replacement=True))
    (drawn,) = numbers_of(source_of(loader, seed=1).iterate(0))
    assert len(set(drawn)) < 80
    orders = [
        numbers_of(
            source_of(
                DataLoader(numbers, 100, sampler=RandomSampler(numbers, generator=own)),
                1,
            ).iterate(0)
        )
        for own in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))
    ]
    assert orders[0] != orders[1]


def test_without_shuffling() -> None:
    """``shuffle=False`` gives a shuffling loader's samples in their stored order, as overfit_batches wants."""
    loader = source_of(
        DataLoader(Numbers(), batch_size=5, shuffle=True), seed=1, shuffle=False
    )
    assert flat(numbers_of(loader.iterate(0))) == list(range(10))


@pytest.mark.parametrize(
    "kind",
    [
        "shuffled",
        "one by one",
        "batch_size=None",
        "own sampler",
        "BatchSampler",
        "subclass",
    ],
)
def test_skipped_samples_are_not_loaded(kind: str) -> None:
    """A jump costs nothing, whatever the sampler."""
    numbers = Numbers()
    rest = numbers_of(source_of(KINDS[kind](numbers), seed=1).iterate(0, 2))
    assert [float(i) for i in numbers.read] == flat(rest)


@pytest.mark.parametrize("kind", KINDS)
def test_the_users_loader_stays_as_it_was(kind: str) -> None:
    """No attribute of it is replaced, and it can be iterated by itself afterwards."""
    loader = KINDS[kind](Numbers())
    before = dict(vars(loader)) if hasattr(loader, "__dict__") else list(loader)
    module = Sees()
    quiet(max_epochs=2).fit(module, loader)
    assert len(module.seen) >= 6
    if isinstance(before, dict):
        assert vars(loader).keys() == before.keys()
        assert all(value is before[name] for name, value in vars(loader).items())
    else:
        assert loader == before
    assert len(list(loader)) * 2 == len(module.seen)


def test_who_wants_to_know_the_epoch_is_told() -> None:
    """set_epoch of the sampler and the dataset."""

    class Told(Shuffled):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    epochs: list[int] = []
    numbers = Numbers()
    quiet(max_epochs=2).fit(Sees(), DataLoader(numbers, 5, sampler=Told("torch")))
    assert sorted(set(epochs)) == sorted(set(numbers.epochs)) == [0, 1]


# -- in a run -------------------------------------------------------------------------------------------------------


class Sees(Module):
    """Notes its training batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return self.weight * torch.rand(
            ()
        )  # draws from torch's generator, as dropout would

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saves(Callback):
    """Saves a checkpoint after so many batches of the run."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == self.after:
            trainer.save_checkpoint("cut.ckpt")


def seen_in_two_parts(
    make: Callable[[], Any], cut: int, epochs: int = 2
) -> tuple[list[Any], list[Any]]:
    """The batches of a whole run, and those of a run that is resumed where ``cut`` batches were done."""
    torch.manual_seed(1)
    whole = Sees()
    quiet(Saves(cut), max_epochs=epochs).fit(whole, make())
    torch.manual_seed(2)
    resumed = Sees()
    quiet(max_epochs=epochs).fit(resumed, make(), ckpt_path="cut.ckpt")
    return whole.seen, resumed.seen


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_gives_the_remaining_batches(kind: str) -> None:
    """In a checkpointed run, two batches into its second epoch."""
    length = len(list(KINDS[kind](Numbers())))
    whole, resumed = seen_in_two_parts(lambda: KINDS[kind](Numbers()), cut=length + 2)
    assert len(whole) == 2 * length
    assert numbers_of(whole[length + 2 :]) == numbers_of(resumed)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_augmentation_is_resumed(workers: int) -> None:
    """By torch's, Python's and NumPy's generators, in the main process and in workers."""

    def make() -> Any:
        return DataLoader(
            Numbers(augment=True), batch_size=2, shuffle=True, num_workers=workers
        )

    whole, resumed = seen_in_two_parts(make, cut=7)
    assert len(whole) == 10
    assert numbers_of(whole[7:]) == numbers_of(resumed)
    assert (
        len({tuple(batch[1:4]) for batch in numbers_of(whole)}) == 10
    )  # random numbers differ from batch to batch


def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    """Nor does their augmentation, nor where the epoch is begun."""

    def batches(workers: int, start: int = 0) -> list[list[float]]:
        loader = DataLoader(
            Numbers(augment=True), batch_size=2, shuffle=True, num_workers=workers
        )
        return numbers_of(source_of(loader, seed=1).iterate(0, start))

    one = batches(1)
    assert batches(2) == one
    assert batches(2, 3) == one[3:]
    assert [batch[::4] for batch in batches(0)] == [batch[::4] for batch in one]


def test_iterable_dataset_in_workers() -> None:
    """Read again from its start and cut, as it has no state; the same in the main process's eyes."""

    def make() -> Any:
        return DataLoader(Stream(), batch_size=2, num_workers=2)

    whole, resumed = seen_in_two_parts(make, cut=8)
    assert len(whole) == 12
    assert numbers_of(whole[8:]) == numbers_of(resumed)


def test_skipping_in_a_stream_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Reading again takes time, so a line says so; jumping says nothing."""
    with caplog.at_level("INFO"):
        list(source_of(KINDS["iterable dataset"](Numbers()), 1).iterate(0, 2))
        assert "reading 2 batches again" in caplog.text
        caplog.clear()
        list(source_of(KINDS["shuffled"](Numbers()), 1).iterate(0, 2))
        assert caplog.text == ""


def test_persistent_workers() -> None:
    """Each epoch in its own order, and none of them is left when the run ends."""
    module = Sees()
    make = DataLoader(
        Numbers(), 5, shuffle=True, num_workers=2, persistent_workers=True
    )
    torch.manual_seed(1)
    trainer = quiet(max_epochs=2)
    trainer.fit(module, make)
    assert multiprocessing.active_children() == []
    plain = Sees()
    torch.manual_seed(1)
    quiet(max_epochs=2).fit(plain, DataLoader(Numbers(), 5, shuffle=True))
    assert numbers_of(module.seen) == numbers_of(plain.seen)


class NotesThreads(DataLoader):
    """Notes which threads of libraries are running when its workers are forked."""

    def __init__(self) -> None:
        super().__init__(Numbers(), 5, num_workers=1)
        self.running: list[Path] = []

    def _get_iterator(self) -> Any:
        pythons = {thread.native_id for thread in threading.enumerate()}
        stats = [
            task / "stat"
            for task in Path("/proc/self/task").iterdir()
            if int(task.name) not in pythons
        ]
        self.running += [
            stat
            for stat in stats
            if stat.read_text().rpartition(") ")[2].startswith("R")
        ]
        return super()._get_iterator()


class BusyElsewhere(Sees):
    """Has a thread that Python does not know count the letters of a long text when workers are about to start."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ctypes.create_string_buffer(b"x" * 100_000_000)
        self.thread = ctypes.c_ulong()

    def on_train_epoch_start(self) -> None:
        libc = ctypes.CDLL(None)
        libc.pthread_create(ctypes.byref(self.thread), None, libc.strlen, self.text)

    def on_train_epoch_end(self) -> None:
        ctypes.CDLL(None).pthread_join(self.thread, None)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_workers_are_forked_when_no_thread_of_a_library_runs() -> None:
    """Such a thread may hold a lock, of Python's too, that nobody would release in the worker: it would hang."""
    module, loader = BusyElsewhere(), NotesThreads()
    quiet().fit(module, loader)
    assert len(module.seen) == 2
    assert loader.running == []


def test_stateful_loader() -> None:
    """One that keeps its own place is asked for it, and given it back."""
    whole, resumed = seen_in_two_parts(Stateful, cut=8)
    assert len(whole) == 12
    assert numbers_of(whole[8:]) == numbers_of(resumed)


def test_a_generator_can_be_read_once() -> None:
    """One epoch is fine; a second one is an error that says what to pass."""
    module = Sees()
    quiet().fit(module, (torch.ones(1) for _ in range(3)))
    assert len(module.seen) == 3
    with pytest.raises(
        RuntimeError, match="no batch in epoch 1; an iterator can be read once only"
    ):
        quiet(max_epochs=2).fit(Sees(), (torch.ones(1) for _ in range(3)))


def test_what_is_no_loader() -> None:
    """Is refused by name."""
    with pytest.raises(
        TypeError,
        match="a loader must be iterable, such as a DataLoader or a list; got 3",
    ):
        quiet().fit(Sees(), 3)


@pytest.mark.parametrize(
    ("loader", "length"),
    [
        (DataLoader(Numbers(), 3), 4),
        ([1, 2], 2),
        (DataLoader(Stream()), INFINITE),
        (DataLoader(Numbers(), batch_sampler=Pairs()), INFINITE),
        (iter([1]), INFINITE),
    ],
)
def test_length(loader: Any, length: float) -> None:
    """Infinite where nothing tells."""
    assert loader_length(loader) == length


def test_a_fraction_of_too_few_batches() -> None:
    """Less than one batch is an error, with the least fraction."""
    assert limited(10, 0.25, "limit") == 2
    with pytest.raises(
        ValueError,
        match=r"limit=0\.05 of 10 batches is less than one batch; use at least 0\.1",
    ):
        limited(10, 0.05, "limit")


# -- several loaders ------------------------------------------------------------------------------------------------


def letters(*names: str) -> list[list[str]]:
    """For "ab", "xyz": two lists of batches."""
    return [list(name) for name in names]


@pytest.mark.parametrize(
    ("mode", "batches"),
    [
        ("min_size", [["a", "x"], ["b", "y"]]),
        ("max_size_cycle", [["a", "x"], ["b", "y"], ["a", "z"]]),
        ("max_size", [["a", "x"], ["b", "y"], [None, "z"]]),
        ("sequential", ["a", "b", "x", "y", "z"]),
    ],
)
def test_combined_loader(mode: str, batches: list[Any]) -> None:
    """How long each mode is, and what its batches are, of lists and of dicts."""
    combined = CombinedLoader(letters("ab", "xyz"), mode)
    assert list(combined) == batches
    assert list(combined) == batches
    assert len(combined) == len(batches)
    by_name = CombinedLoader(
        dict(zip(("one", "two"), letters("ab", "xyz"), strict=True)), mode
    )
    expected = (
        batches
        if mode == "sequential"
        else [dict(zip(("one", "two"), batch, strict=True)) for batch in batches]
    )
    assert list(by_name) == expected


@pytest.mark.parametrize("mode", CombinedLoader.MODES)
@pytest.mark.parametrize("sizes", [(4, 10), (10, 4), (6, 6), (1, 10), (2, 10)])
def test_combined_loaders_from_any_batch(mode: str, sizes: tuple[int, int]) -> None:
    """Each mode can be begun anywhere, further rounds of a shorter loader included."""

    def batches(start: int) -> list[Any]:
        made = [DataLoader(Numbers(size), batch_size=2, shuffle=True) for size in sizes]
        parts = [source_of(loader, seed) for seed, loader in enumerate(made)]
        return list(CombinedSource(CombinedLoader(made, mode), parts).iterate(1, start))

    whole = batches(0)
    lengths = [-(-size // 2) for size in sizes]
    assert len(whole) == {"min_size": min(lengths), "sequential": sum(lengths)}.get(
        mode, max(lengths)
    )
    for start in range(len(whole) + 1):
        assert str(batches(start)) == str(whole[start:])


def test_rounds_of_a_shorter_loader_differ() -> None:
    """Begun again, it is shuffled anew."""
    made = [
        DataLoader(Numbers(6), batch_size=6, shuffle=True),
        DataLoader(Numbers(12), batch_size=1),
    ]
    parts = [source_of(loader, seed=1) for loader in made]
    combined = CombinedSource(CombinedLoader(made, "max_size_cycle"), parts)
    rounds = [tuple(batch[0].tolist()) for batch in combined.iterate(0)]
    assert len(set(rounds)) > 6


@pytest.mark.parametrize(
    "given",
    [
        lambda: {
            "a": DataLoader(Numbers(4), 2, shuffle=True),
            "b": DataLoader(Numbers(8), 2, shuffle=True),
        },
        lambda: [
            DataLoader(Numbers(4), 2, shuffle=True),
            DataLoader(Numbers(8), 2, shuffle=True),
        ],
        lambda: CombinedLoader([DataLoader(Numbers(8), 2), Stateful()], "min_size"),
        lambda: CombinedLoader(
            [DataLoader(Numbers(4), 2), DataLoader(Numbers(4), 2)], "sequential"
        ),
    ],
)
def test_several_loaders_in_fit(given: Callable[[], Any]) -> None:
    """A dict or list of loaders, or a CombinedLoader, to train on; resumed exactly."""
    whole, resumed = seen_in_two_parts(given, cut=6)
    assert len(whole) == 8
    assert str(whole[6:]) == str(resumed)
    made = given()
    kind = dict if isinstance(made, dict) else list
    if getattr(made, "mode", "") != "sequential":
        assert all(type(batch) is kind and len(batch) == 2 for batch in whole)


class Pair(NamedTuple):
    """Two loaders, or batches."""

    first: Any
    second: Any


def numbered(first: int) -> DataLoader[Any]:
    """Two batches of one number."""
    return DataLoader(Numbers(first + 2), batch_sampler=[[first], [first + 1]])


def first_numbers(batch: Any) -> Any:
    """A batch with numbers in the place of its tensors."""
    if isinstance(batch, dict):
        return {name: first_numbers(part) for name, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(first_numbers, batch))
    return (
        type(batch)(map(first_numbers, batch))
        if isinstance(batch, (list, tuple))
        else int(batch)
    )


@pytest.mark.parametrize(
    ("make", "batches"),
    [
        (lambda n: {"a": n(0), "b": [n(10), n(20)]}, {"a": 0, "b": [10, 20]}),
        (
            lambda n: [n(0), {"x": n(10), "y": (n(20), n(30))}],
            [0, {"x": 10, "y": (20, 30)}],
        ),
        (lambda n: [{"x": n(0)}, {"x": n(10)}], [{"x": 0}, {"x": 10}]),
        (lambda n: Pair(n(0), Pair(n(10), [n(20)])), Pair(0, Pair(10, [20]))),
        (
            lambda n: MappingProxyType({"a": n(0), "b": UserDict(c=n(10))}),
            {"a": 0, "b": {"c": 10}},
        ),
        (lambda n: OrderedDict(a=(n(0),), b=[[n(10)]]), {"a": (0,), "b": [[10]]}),
        (
            lambda n: {"a": [10, 11], "b": [n(20), [30, 31]]},
            {"a": 10, "b": [20, 30]},
        ),  # lists of batches
        (
            lambda n: {"a": CombinedLoader([n(0), n(10)]), "b": n(20)},
            {"a": [0, 10], "b": 20},
        ),
        (lambda n: [[OfItsOwn(0), OfItsOwn(10)], n(20)], [[0, 10], 20]),
        (lambda n: [Moved(0), Moved(10)], [0, 10]),
        (lambda n: {"a": Moved(0), "b": n(10)}, {"a": 0, "b": 10}),
        (lambda n: {"a": n(0), "b": n(10)}.values(), [0, 10]),
        (lambda n: UserList([n(0), deque([n(10), n(20)])]), [0, [10, 20]]),
    ],
)
def test_nested_collections_of_loaders(make: Any, batches: Any) -> None:
    """A batch has the loaders' batches in their places: in fit, in a CombinedLoader, in evaluation one by one."""
    module = Sees()
    quiet().fit(module, make(numbered))
    assert len(module.seen) == 2
    assert type(module.seen[0]) is type(batches)
    assert first_numbers(module.seen[0]) == batches
    for mode in ("min_size", "max_size", "max_size_cycle"):
        assert (
            first_numbers(next(iter(CombinedLoader(make(numbered), mode)))) == batches
        )
    flat = CombinedLoader(make(numbered), "sequential").flattened
    found = quiet().predict(Predicts(), make(numbered)) or []
    assert [part[0] for part in found] == [
        first_numbers(next(iter(own))) for own in flat
    ]


class OfItsOwn(IterableOnly):
    """A loader that is no DataLoader."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[Any]:
        return iter(range(self.first, self.first + 2))


class Moved(OfItsOwn):
    """One that moves its batches itself, and has a ``to`` as tensors do."""

    def to(self, device: Any) -> Any:
        return self


class Predicts(Sees):
    """Gives the batch back, as numbers."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return first_numbers(batch)


@pytest.mark.parametrize("beside", [None, torch.ones(2), "b"])
@pytest.mark.parametrize(
    "make", [lambda given: given, lambda given: {"a": given}, CombinedLoader]
)
def test_a_loader_among_batches(make: Any, beside: Any) -> None:
    """Is never taken for one."""
    with pytest.raises(
        TypeError, match="a collection of loaders must hold nothing else"
    ):
        quiet().fit(Sees(), make([numbered(0), beside]))


def test_two_loaders_of_one_dataset_are_shuffled_apart() -> None:
    """Otherwise both would give the same samples all the time."""
    module = Sees()
    quiet().fit(
        module,
        [
            DataLoader(Numbers(), 5, shuffle=True),
            DataLoader(Numbers(), 5, shuffle=True),
        ],
    )
    assert any(not torch.equal(first, second) for first, second in module.seen)


def test_a_list_of_batches_is_one_loader() -> None:
    """Lists and tuples of tensors are batches, not loaders."""
    for kind in (list, tuple, UserList, deque):
        module = Sees()
        quiet().fit(
            module,
            [
                kind([torch.ones(2), torch.zeros(2)]),
                kind([torch.ones(2), torch.zeros(2)]),
            ],
        )
        assert len(module.seen) == 2
        assert type(module.seen[0]) is kind


def test_combined_loader_for_validation() -> None:
    """Sequential ones count as several loaders; others give one joined batch."""

    class Validates(Sees):
        def validation_step(
            self, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            self.seen.append((batch_idx, dataloader_idx, type(batch)))

    parts = [DataLoader(Numbers(2), 2), DataLoader(Numbers(4), 2)]
    for mode, expected in (
        ("sequential", [(0, 0, Tensor), (0, 1, Tensor), (1, 1, Tensor)]),
        ("max_size", [(0, 0, list), (1, 0, list)]),
    ):
        module = Validates()
        quiet().validate(module, CombinedLoader(parts, mode), verbose=False)
        assert module.seen == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1]], "longest"), "mode must be one of min_size.*got 'longest'"),
        (([],), "at least one loader; got \\[\\]"),
    ],
)
def test_combined_loader_arguments(arguments: Any, message: str) -> None:
    """Are checked."""
    with pytest.raises(ValueError, match=message):
        CombinedLoader(*arguments)


def test_a_generator_that_has_been_looked_at_is_read_whole_in_any_epoch() -> None:
    loader = source_of((number for number in range(4)), seed=0)
    assert loader.peek(0) == 0
    assert list(loader.iterate(3)) == [0, 1, 2, 3]


class WithoutEnd(Sampler):
    """Begins again for ever, and tells a length."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(4).tolist()


def test_a_sampler_without_end_is_cut_as_any_other() -> None:
    loader = source_of(DataLoader(range(4), 2, sampler=WithoutEnd()), seed=0)  # type: ignore[arg-type]
    whole = [batch.tolist() for batch in islice(loader.iterate(0), 6)]
    assert sorted(whole[0] + whole[1]) == sorted(whole[4] + whole[5]) == [0, 1, 2, 3]
    assert [batch.tolist() for batch in islice(loader.iterate(0, 3), 3)] == whole[3:]


def test_an_endless_loader_is_cut() -> None:
    """limit_train_batches reads no batch more than it says."""

    class Endless(IterableDataset[Any]):
        def __init__(self) -> None:
            self.read = 0

        def __iter__(self) -> Iterator[Any]:
            while True:
                self.read += 1
                yield torch.ones(1)

    endless = Endless()
    quiet(limit_train_batches=3).fit(Sees(), DataLoader(endless, batch_size=1))
    assert endless.read == 3
    assert len(list(islice(endless, 2))) == 2


class InThread(DataLoader[Any]):
    """Reads ahead in a thread; one that marks the end reads until the mark, else as many as its length tells."""

    def __init__(self, *args: Any, marks_end: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.marks_end = marks_end

    def __iter__(self) -> Iterator[Any]:  # a recipe that is in use
        batches, iterate, end = queue.Queue(1), super().__iter__, object()

        def read() -> None:
            try:
                for batch in iterate():
                    batches.put(batch)
            finally:
                if self.marks_end:
                    batches.put(end)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        if self.marks_end:
            yield from iter(batches.get, end)
        else:
            ahead = batches.get()
            for _ in range(len(self) - 1):
                ahead, batch = batches.get(), ahead
                yield batch
            yield ahead
        thread.join()


@pytest.mark.parametrize("marks_end", [True, False])
def test_a_loader_that_reads_in_a_thread(marks_end: bool) -> None:
    """It is read in the run's order, and no thread is left."""
    threads, module, expected = threading.active_count(), Sees(), Sees()
    quiet(max_epochs=2).fit(
        module, InThread(Numbers(), 3, shuffle=True, marks_end=marks_end)
    )
    quiet(max_epochs=2).fit(expected, DataLoader(Numbers(), 3, shuffle=True))
    assert numbers_of(module.seen) == numbers_of(expected.seen)
    assert threading.active_count() == threads
