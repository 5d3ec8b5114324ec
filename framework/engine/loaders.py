"""The Engine's loaders: the user's own, sharded over the ranks, on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..checkpoint.schema import LoaderState
from ..data.device_input import CopiedAhead, copied_ahead
from ..data.iteration import INFINITE, LookAhead
from ..data.sharding import ShardedLoader
from ..seed import isolated_rng, mix_seeds
from .wrapper import Wrapper

if TYPE_CHECKING:
    from .engine import Engine


class PreparedLoader(Wrapper):
    """A loader as one of several ranks reads it, epoch after epoch, with a position from which it resumes.

    The batches are those of the loader given, sharded in turn: rank *r* of *W* gets batches *r*, *r + W*, …; each rank
    gets as many. One that has none in the last round gets its last again, a dummy that counts nothing in
    ``Engine.backward`` and ``Engine.gather_for_metrics``. The order of a shuffled loader follows from torch's seed
    (``seed_everything``) and the epoch.

    Attributes of the loader itself, such as ``dataset``, can be read through it.

    Attributes:
        loader: the loader given.
        batches: number of batches given in this epoch.
        batch_weight: what the running batch counts beside those of the other ranks; 0.0 for a dummy.
        end_of_dataloader: whether the running batch is the epoch's last. Where the length is not certain and the
            loader keeps a state of its own, it tells so only inside a window of several batches.
        batch: the running batch.
        keeps_position: whether checkpoints hold its position.
    """

    _wraps = "loader"
    keeps_position = True

    def __init__(self, loader: Any, engine: Engine, index: int = 0) -> None:
        self.loader = loader
        self.engine = engine
        self._index = index
        self._sharded = ShardedLoader(
            loader,
            engine.strategy,
            self._seed(engine.prepared.draw_data_seed()),
            use_distributed_sampler=engine.use_distributed_sampler,
            reads_ahead=True,
        )
        self.batches = 0
        self.batch_weight = 1.0
        self.end_of_dataloader = False
        self.batch: Any = None
        # Whether the next iteration goes on at `batches`, as a checkpoint that was saved there has been loaded.
        self._goes_on = False

    def __len__(self) -> int:
        length = self.length
        if length == INFINITE:
            length = self._sharded.reported_length
        if length == INFINITE:
            raise TypeError("the loader has no length")
        return int(length)

    @property
    def length(self) -> float:
        """Number of batches of an epoch, on each rank; infinite if that is not certain."""
        return self._sharded.epoch_length

    @property
    def share(self) -> float:
        """:attr:`batch_weight`, under its former name."""
        return self.batch_weight

    @property
    def epoch(self) -> int:
        """How often it has been read to its end; :meth:`set_epoch` sets it."""
        return self._sharded.epoch

    @property
    def stateful(self) -> bool:
        """Whether the loader has a state of its own, which differs between ranks."""
        return self.engine.num_processes > 1 and self._sharded.stateful

    def read_in_order_of(self, seed: int) -> None:
        """Draw the order of a shuffled loader from ``seed``: the first one as the Trainer does, others in their own."""
        self._sharded.source.reseed(self._seed(seed))

    def _seed(self, seed: int) -> int:
        return seed if self._index == 0 else mix_seeds(seed, self._index)

    def set_epoch(self, epoch: int) -> None:
        """Begin with the first batch of ``epoch`` when iterated next."""
        self.batches = 0
        self._goes_on = False
        self._sharded.begin_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        return self.iterate()

    def iterate(self, start: int = 0) -> Iterator[Any]:
        """Iterate the epoch from batch ``start``, or from where a checkpoint was saved."""
        sharded = self._sharded
        is_inside = self._goes_on and self.batches > 0
        if self._goes_on:
            start = self.batches
            self._goes_on = False
        elif self.batches:
            # The last iteration was left before its end: this one is the next epoch.
            sharded.begin_epoch(self.epoch + 1)
        length = self.length
        if is_inside and start < length:
            sharded.source.require_resumable()
        self.batches = given = start
        engine = self.engine
        engine.enter_loader(self)
        try:
            transfer = engine.to_device if engine.moves_batches else None
            batches: Iterator[Any] = iter(())
            if not start or start < length:
                # A DataLoader's iterator draws a random number when it begins. The restored generator is past that.
                with isolated_rng() if is_inside else nullcontext():
                    batches = sharded.iterate(start)
            self.end_of_dataloader = False
            batches = copied_ahead(batches, self.loader, sharded, engine.device)
            source: Any = batches if isinstance(batches, CopiedAhead) else sharded
            ahead = None
            if not sharded.is_length_certain:
                batches = source = ahead = LookAhead(batches, source)
            for batch in batches:
                self.batches = given = given + 1
                self.batch_weight = source.batch_weight
                self.end_of_dataloader = self._is_at_end(ahead) or given >= length
                self.batch = batch if transfer is None else transfer(batch)
                yield self.batch
            self.batches = 0
            sharded.begin_epoch(self.epoch + 1)
        finally:
            self.batch = None
            engine.leave_loader(self)

    def _is_at_end(self, ahead: LookAhead | None) -> bool:
        """Whether the running batch is known to be the last, which may take reading the next one.

        Checkpoints are saved at the end of a window. There, a loader that keeps a state of its own must not have read
        ahead; so of such a loader the next batch is read only where the window goes on.
        """
        if ahead is None:
            return False
        if self._sharded.stateful and not self.engine.accumulation.goes_on_next():
            return False
        return ahead.at_end

    def state_dict(self) -> LoaderState:
        """The position: that of the batches given so far, less those of an open window."""
        batches = self.batches - self.engine.accumulation.batches_of(self)
        is_done = not self.batches or batches >= self.length
        return self._sharded.state_dict(batches, is_done)

    def load_state_dict(self, state: LoaderState, saved_by: int | None = None) -> None:
        """Go on from there when iterated next; ``saved_by`` tells how many processes saved it, if not as many as now.

        Raises:
            CheckpointError: if what they have left of the epoch cannot be sharded over these.
        """
        self._sharded.load_state_dict(state, saved_by)
        self.batches = state["batches"]
        self._goes_on = True

    def close(self) -> None:
        """End the workers."""
        self._sharded.close()


class SkippedLoader(Wrapper):
    """A loader without its first batches, in each iteration."""

    _wraps = "loader"

    def __init__(self, loader: Any, skipped: int) -> None:
        self.loader = loader
        self.skipped = skipped

    def __len__(self) -> int:
        return max(0, len(self.loader) - self.skipped)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.loader, PreparedLoader):
            return self.loader.iterate(self.skipped)
        return islice(iter(self.loader), self.skipped, None)
