"""Where in an epoch a loader is, which part of it is read, and how a checkpoint holds that."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from torch.utils.data import DataLoader

from loopwright.framework import CheckpointError, CombinedLoader, Engine
from loopwright.framework.data.combined import source_of
from loopwright.framework.data.iteration import INFINITE
from loopwright.framework.data.position import WHOLE_EPOCH, Segment
from loopwright.framework.data.sharding import ShardedLoader
from loopwright.strategies import SingleDeviceStrategy

ORDER = [7, 3, 9, 1, 5]


@pytest.mark.parametrize(
    ("segment", "inside", "seeds"),
    [
        (WHOLE_EPOCH, [7, 3, 9, 1, 5], ()),
        (Segment(first_batch=1, begin=2), [9, 1, 5], (2,)),
        (Segment(first_batch=1, begin=2, end=4), [9, 1], (2,)),
        (Segment(first_batch=1, end=4), [7, 3, 9, 1], ()),
        (Segment(first_batch=3, begin=5), [], (5,)),
        (Segment(first_batch=3, begin=4, end=2), [], (4,)),
    ],
)
def test_a_segment(segment: Segment, inside: list[int], seeds: tuple[int, ...]):
    assert segment.slice(ORDER) == inside
    assert segment.length_of(len(ORDER)) == len(inside)
    assert segment.seeds == seeds
    assert Segment.from_state(segment.state_dict()) == segment


def test_what_checkpoints_hold():
    assert WHOLE_EPOCH.state_dict() is None
    assert Segment(2, 16, 24).state_dict() == {"first": 2, "begin": 16, "end": 24}


def test_without_length():
    assert WHOLE_EPOCH.length_of(INFINITE) == INFINITE
    assert Segment(begin=3, end=8).length_of(INFINITE) == 5


def sharded(batch_size: int = 2, seed: int = 1) -> ShardedLoader:
    samples = list(range(10))
    loader = DataLoader(samples, batch_size, shuffle=True)  # type: ignore[arg-type]
    return ShardedLoader(loader, SingleDeviceStrategy(), seed)


def plain(batches: Iterator[Any]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def test_a_loader_goes_on_from_its_position():
    whole = sharded()
    whole.begin_epoch(3)
    expected = plain(whole.iterate())
    resumed = sharded()
    resumed.load_state_dict(whole.state_dict(2))
    assert resumed.epoch == 3
    assert resumed.segment == WHOLE_EPOCH
    assert plain(resumed.iterate(2)) == expected[2:]


def test_a_loader_of_other_batches_reads_the_rest_as_a_segment():
    whole = sharded(batch_size=2)
    order = [number for batch in plain(whole.iterate()) for number in batch]
    resumed = sharded(batch_size=3)
    resumed.load_state_dict(whole.state_dict(2))
    assert resumed.segment == Segment(first_batch=2, begin=4)
    assert resumed.epoch_length == 2 + 2
    assert plain(resumed.iterate(2)) == [order[4:7], order[7:]]
    again = sharded(batch_size=3)
    again.load_state_dict(resumed.state_dict(3))
    assert plain(again.iterate(3)) == [order[7:]]


def test_what_is_left_out_is_found_again_by_loaders_of_other_batches():
    whole = sharded(batch_size=2)
    whole.begin_epoch(3)
    place = whole.place_of(3, 2)
    assert place == {"epoch": 3, "begin": 4, "end": 6, "in_samples": True}
    other = sharded(batch_size=3)
    other.begin_epoch(3)
    assert [*other.steps_with(place)] == [1], "samples 3 to 5 of the order"
    # A segment that begins with sample 2, after one batch of the epoch.
    other.begin_epoch(3, Segment(first_batch=1, begin=2))
    assert [*other.steps_with(place)] == [1, 2]
    other.begin_epoch(3, Segment(first_batch=1, begin=6))
    assert [*other.steps_with(place)] == []
    other.begin_epoch(4)
    assert [*other.steps_with(place)] == []
    stream = ShardedLoader([[0]], SingleDeviceStrategy(), 1, epoch=3)
    with pytest.raises(CheckpointError, match="sampler has been changed"):
        stream.steps_with(place)


def test_what_checkpoints_hold_of_a_position():
    loader = sharded()
    assert loader.state_dict(2, limit=4) == {
        "epoch": 0,
        "batches": 2,
        "loader": None,
        "part": None,
        "cursor": {
            "position": 4,
            "end": 8,
            "in_samples": True,
            "batch_sizes": [2],
            "dealt": True,
            "dealt_to": 1,
        },
    }


class Counts:
    """A loader that knows how far it has been read, and can only be moved by its own state."""

    def __init__(self, batches: int = 8) -> None:
        self.batches = batches
        # By which an Engine knows a loader.
        self.dataset = range(batches)
        self.position = self.begin = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[int]:
        self.position, self.begin = self.begin, 0
        while self.position < self.batches:
            self.position += 1
            yield self.position - 1

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["position"]


class Part(Counts):
    """Which part of the data it reads is in its state."""

    def __init__(self, first: int) -> None:
        super().__init__(3)
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return (self.first + number for number in super().__iter__())

    def state_dict(self) -> dict[str, int]:
        # At its end, the next iteration begins anew.
        position = self.position % self.batches
        return {"position": position, "first": self.first}

    def load_state_dict(self, state: dict[str, int]) -> None:
        super().load_state_dict(state)
        self.first = state["first"]


def test_at_an_epochs_end_others_cannot_tell_of_a_loader_that_shards_itself():
    """The state of another number of ranks is of another part of the data; what is dealt out is the same for all."""

    def read(saved_by: int, dealt: bool) -> list[int]:
        engine = Engine(accelerator="cpu", devices=1)
        saved: Any = engine.prepare(Part(0))
        assert list(saved) == [0, 1, 2]
        state = saved.state_dict()
        assert (state["epoch"], state["batches"]) == (1, 0)
        state["cursor"]["dealt"] = dealt
        loader: Any = engine.prepare(Part(50))
        loader.load_state_dict(state, saved_by=saved_by)
        return list(loader)

    assert read(1, dealt=True) == read(2, dealt=True) == [0, 1, 2]
    assert read(1, dealt=False) == [0, 1, 2]
    assert read(2, dealt=False) == [50, 51, 52]


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
@pytest.mark.parametrize("cut", [1, 2, 3, 5])
@pytest.mark.parametrize("back", [0, 1])
def test_loaders_read_together_of_which_one_is_sharded(mode: str, cut: int, back: int):
    """Each goes on at its own batch, maybe one that it has given: of one, every other batch is this rank's."""

    def make() -> Any:
        loaders = {"dealt": Counts(8), "own": Counts(7 if mode != "min_size" else 4)}
        source = source_of(CombinedLoader(loaders, mode), 1)
        source.parts[0].read_shard(1, 2)
        return source

    whole = [(batch["dealt"], batch["own"]) for batch in make().iterate(0)]
    again = [(1, 4), (3, 5), (5, 6)] if mode != "min_size" else []
    assert whole == [(1, 0), (3, 1), (5, 2), (7, 3), *again]
    source = make()
    before = list(islice(source.iterate(0), cut))
    if cut - back == 4 and again:
        # It has begun the next round: its state is ahead.
        back = 0
    state = source.state_dict(cut - back)
    resumed = make()
    resumed.load_state_dict(state)
    rest = [*before[: cut - back], *resumed.iterate(0, cut - back)]
    assert [(batch["dealt"], batch["own"]) for batch in rest] == whole
