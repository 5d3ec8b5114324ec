"""The Engine's loaders: the user's own, in each process's part, on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..data.combined import exact_length_of, source_of
from ..data.iteration import INFINITE, LookAhead
from ..data.position import WHOLE_EPOCH, Segment
from ..data.sharding import (
    SharedLoader,
    cursor_of,
    data_place,
    gives_parts,
    rest_of_epoch,
)
from ..data.sources import BatchSource
from ..seed import isolated_rng, mix_seeds
from .wrapper import Wrapper

if TYPE_CHECKING:
    from .engine import Engine


class PreparedLoader(Wrapper):
    """A loader as one of several processes reads it, epoch after epoch, with a place from which it can go on.

    The batches are those of the loader given, dealt out in turn: rank *r* of *W* gets batches *r*, *r + W*, …; each
    process gets as many. One that has none in the last round gets its last again, which counts nothing in
    ``Engine.backward`` and ``Engine.gather_for_metrics``. The order of a shuffled loader follows from torch's seed
    (``seed_everything``) and the epoch.

    Attributes of the loader itself, such as ``dataset``, can be read through it.

    Attributes:
        loader: the loader given.
        epoch: how often it has been read to its end; :meth:`set_epoch` sets it.
        batches: batches given in this epoch.
        length: batches of an epoch, in each process; infinite if that is not certain. ``len()`` gives what the loader
            tells, an estimate where it is a stream.
        share: what the running batch counts beside those of the other processes.
        end_of_dataloader: whether the running batch is the epoch's last. Where the length is not certain and the
            loader keeps a state of its own, it tells so only inside a window of several batches.
        batch: the running batch.
    """

    _wraps = "loader"

    def __init__(self, loader: Any, engine: Engine, index: int = 0) -> None:
        self.loader, self.engine, self._index = loader, engine, index
        self._looks_ahead = (
            exact_length_of(loader, trusts_samplers=engine.num_processes > 1)
            == INFINITE
        )
        source = source_of(loader, self._seed(engine.prepared.draw_data_seed()))
        # Of one that keeps its own state a batch is read ahead inside a window only: at its end, where checkpoints are
        # saved, that state must not be ahead.
        self._stateful = any(part.stateful for part in source.parts)
        source.read_ahead(self._looks_ahead and not self._stateful)
        self.source: BatchSource | SharedLoader = source
        if engine.num_processes > 1:
            strategy, asked = engine.strategy, engine.use_distributed_sampler
            own = gives_parts(source, strategy, asked, 0, "loader")
            self.source = SharedLoader(
                source, strategy, deal=not own, verify=asked is None
            )
        self.epoch = self.batches = 0
        self._read_segment(WHOLE_EPOCH)
        self.share = 1.0
        self.end_of_dataloader = False
        self.batch: Any = None
        self._goes_on = False  # the next iteration begins at `batches`, where a checkpoint was saved

    def __len__(self) -> int:
        length = self.source.told_length if self.length == INFINITE else self.length
        if length == INFINITE:
            raise TypeError("the loader has no length")
        return int(length)

    @property
    def stateful(self) -> bool:
        """Whether the loader has a state of its own, which differs between processes."""
        return self.engine.num_processes > 1 and self._stateful

    def read_in_order_of(self, seed: int) -> None:
        """Draw the order of a shuffled loader from ``seed``: the first one as the Trainer does, others in their own."""
        source = self.source
        if isinstance(source, SharedLoader):
            source = source.loader
        source.reseed(self._seed(seed))

    def _seed(self, seed: int) -> int:
        return seed if self._index == 0 else mix_seeds(seed, self._index)

    def set_epoch(self, epoch: int) -> None:
        """Begin with the first batch of ``epoch`` when iterated next."""
        self.epoch, self.batches, self._goes_on = epoch, 0, False
        self._read_segment(WHOLE_EPOCH)

    def _read_segment(self, segment: Segment) -> None:
        """Give a segment of the epoch."""
        self._segment = segment
        self.length = segment.first_batch + self.source.length_in(segment)
        if self._looks_ahead and segment == WHOLE_EPOCH:
            self.length = INFINITE

    def __iter__(self) -> Iterator[Any]:
        return self.iterate()

    def iterate(self, start: int = 0) -> Iterator[Any]:
        """Iterate the epoch from batch ``start``, or from where a checkpoint was saved."""
        inside = self._goes_on and self.batches > 0
        if self._goes_on:
            start, self._goes_on = self.batches, False
        elif self.batches:
            self.epoch += 1  # the last one was left before its end
            self._read_segment(WHOLE_EPOCH)
        if inside and start < self.length:
            self.source.require_resumable()
        self.batches = start
        engine = self.engine
        engine.enter_loader(self)
        try:
            transfer = engine.to_device if engine.moves_batches else None
            with (
                isolated_rng() if inside else nullcontext()
            ):  # the iterator draws a number, as it did before the save
                batches = self._batches_from(start)
            self.end_of_dataloader = False
            source: Any = self.source
            ahead = None
            dealt = engine.num_processes > 1
            given, length = start, self.length
            if self._looks_ahead:
                batches = source = ahead = LookAhead(batches, source)
            for batch in batches:
                self.batches = given = given + 1
                if dealt:
                    self.share = source.share
                if ahead is not None:
                    self.end_of_dataloader = self._tells_end() and ahead.at_end
                if given >= length:
                    self.end_of_dataloader = True
                self.batch = batch if transfer is None else transfer(batch)
                yield self.batch
            self.epoch += 1
            self.batches = 0
            self._read_segment(WHOLE_EPOCH)
        finally:
            self.batch = None
            engine.leave_loader(self)

    def _batches_from(self, start: int) -> Iterator[Any]:
        segment = self._segment
        if start and start >= self.length:
            return iter(())
        start -= segment.first_batch
        return self.source.iterate(self.epoch, start, segment=segment)

    def _tells_end(self) -> bool:
        """Whether a batch may be read ahead, to tell if the running one is the last."""
        return not self._stateful or self.engine.accumulation.goes_on_next()

    def state_dict(self) -> dict[str, Any]:
        """The place: the epoch, its batches given so far, less those of an open window; the loader's own state."""
        behind = self.engine.accumulation.batches_of(self)
        batches = self.batches - behind
        first = self._segment.first_batch
        done = not self.batches or batches >= self.length
        reads_again = self._looks_ahead and not self._stateful
        own = (
            None
            if reads_again
            else self.source.state_dict(max(0, batches - first), done)
        )
        cursor = cursor_of(
            self.source, data_place(self.engine.strategy)[1], batches, self._segment
        )
        return {
            "epoch": self.epoch,
            "batches": batches,
            "loader": own,
            "part": self._segment.state_dict(),
            "cursor": cursor,
        }

    def load_state_dict(
        self, state: dict[str, Any], saved_by: int | None = None
    ) -> None:
        """Go on from there when iterated next; ``saved_by`` tells how many processes saved it, if not as many as now.

        Raises:
            CheckpointError: if what they have left of the epoch cannot be dealt out to these.
        """
        world_size = data_place(self.engine.strategy)[1]
        saved_by = saved_by or world_size
        batches = state["batches"]
        segment = Segment.from_state(state["part"])
        if batches:
            cursor = state["cursor"]
            rest = rest_of_epoch(cursor, self.source, saved_by, world_size, batches)
            segment = rest or segment
        self.epoch, self.batches, self._goes_on = state["epoch"], batches, True
        self._read_segment(segment)
        # Others' states tell nothing about an epoch's end.
        if batches or world_size == saved_by:
            self.source.load_state_dict(state["loader"])

    def close(self) -> None:
        """End the workers."""
        self.source.close()


class SkippedLoader(Wrapper):
    """A loader without its first batches, in each iteration."""

    _wraps = "loader"

    def __init__(self, loader: Any, skipped: int) -> None:
        self.loader, self.skipped = loader, skipped

    def __len__(self) -> int:
        return max(0, len(self.loader) - self.skipped)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.loader, PreparedLoader):
            return self.loader.iterate(self.skipped)
        return islice(iter(self.loader), self.skipped, None)
