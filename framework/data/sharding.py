"""How a loader's batches are sharded over the ranks, so that all take the same steps, and where it resumes.

Here, ranks are those that get different batches; ranks of one tensor-parallel group get the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any

from ..checkpoint.schema import Cursor, LeftOut, LoaderState
from ..errors import CheckpointError
from ..seed import isolated_rng
from .combined import exact_length_of, source_of
from .iteration import INFINITE, NO_BATCH, is_map_style
from .position import WHOLE_EPOCH, Segment
from .shard_detection import data_parallel_rank_and_size, fingerprint, is_sharded

if TYPE_CHECKING:
    from ...strategies import Strategy

# Where nobody knows how many batches there are, the ranks tell each other after so many steps how far they can see.
LOOK_AHEAD = 8


class ShardedLoader:
    """A user's loader as one rank reads it, epoch after epoch, and the position from which it resumes.

    One rank reads the loader as it is. The batches of a loader that several ranks have are sharded in turn: rank *r* of
    *W* gets batches *r*, *r + W*, *r + 2W*, … So each rank has batches of the loader's own size, and each sample is
    read once. If the last round is incomplete, the ranks without a batch get a dummy, their last batch again, to stay
    in step; the others weigh by size, so that the gradient is the mean over the round's samples. ``drop_last`` leaves
    that round out.

    A loader that gives each rank its own part of the data is read to its end, and the others wait in the same way.

    Args:
        loader: any iterable that can be iterated again, or a ``CombinedLoader``.
        strategy: tells this rank, and lets it talk to the others.
        seed: from which the order of the data is drawn.
        shuffle: False puts the samples of a shuffling ``DataLoader`` in their stored order.
        use_distributed_sampler: False if each rank's loader gives it its own part of the data, True if batches are to
            be sharded; None lets the ranks compare what they read.
        reads_ahead: whether one rank reads a loader without a certain length ahead of its use.
        name: what to call the loader in messages.
        epoch: the epoch that begins.
        cursor: the position in the checkpoint from which to resume, if there is one.

    Attributes:
        source: the loader, to be iterated by epochs.
        shards_batches: whether all ranks have the same loader, whose batches are sharded.
        length: steps of an epoch, the same on all ranks; infinite if that is not certain.
        reported_length: the same, as the loader tells it.
        is_length_certain: whether the length tells where an epoch ends, without a look ahead.
        batch_weight: the factor for the loss of the batch given last, before the ranks' gradients are averaged; 0.0 for
            a dummy.
        epoch: index of the epoch to iterate.
        segment: what the ranks read of it.

    Raises:
        ValueError: if a loader that is to be sharded has different lengths.
    """

    def __init__(
        self,
        loader: Any,
        strategy: Strategy,
        seed: int,
        *,
        shuffle: bool = True,
        use_distributed_sampler: bool | None = None,
        reads_ahead: bool = False,
        name: str = "loader",
        epoch: int = 0,
        cursor: Cursor | None = None,
    ) -> None:
        self.strategy = strategy
        self.source = source_of(loader, seed, shuffle)
        self.shards_batches = True
        self.batch_weight = 1.0
        self.epoch = epoch
        self.segment = WHOLE_EPOCH
        if strategy.world_size > 1:
            self.shards_batches = not is_sharded(
                self.source, strategy, use_distributed_sampler, epoch, name, cursor
            )
        self.rank = strategy.global_rank
        self.world_size = strategy.world_size
        if self.shards_batches:
            self.rank, self.world_size = data_parallel_rank_and_size(strategy)
        lengths = (self.source.length, self.source.reported_length)
        by_rank = strategy.gather_objects(lengths)  # collective
        self._lengths: list[float] = [length for length, _ in by_rank]
        if self.shards_batches:
            require_equal_lengths(self._lengths, "the training loader")
        self.length = self._steps(max(self._lengths))
        self.reported_length = self._steps(max(reported for _, reported in by_rank))
        self.is_length_certain = self.length < INFINITE
        # Whether the first batches of a stream are still to be compared, to see that it is the same on all ranks.
        self._compares = False
        self._marks: list[str] | None = None
        if strategy.world_size == 1:
            exact = exact_length_of(loader, trusts_samplers=False)
            self.is_length_certain = exact < INFINITE
            is_ahead = reads_ahead and not self.is_length_certain
            self.source.read_ahead(is_ahead and not self.stateful)
        else:
            self._stay_in_step(compares=use_distributed_sampler is None)

    def _stay_in_step(self, compares: bool) -> None:
        """Read the source as one of several ranks; ``compares`` tells whether they check that they read one stream."""
        is_uncertain = self.length == INFINITE
        apart = () if self.shards_batches else (self.strategy.global_rank,)
        self.source.read_ahead(is_uncertain or self.source.has_own_iteration, apart)
        self._compares = compares and self.shards_batches and is_uncertain
        for part in self.source.parts:
            # A map-style loader may augment a sample differently on each rank, so it is not compared.
            if self._compares and part.is_stream and not is_map_style(part.loader):
                part.watch(self._marking)

    @property
    def stateful(self) -> bool:
        """Whether the loader, or one of several, has a state of its own."""
        return any(part.stateful for part in self.source.parts)

    # Position ----------------------------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int, segment: Segment = WHOLE_EPOCH) -> None:
        """Set the epoch to iterate next."""
        self.epoch = epoch
        self.segment = segment

    @property
    def epoch_length(self) -> float:
        """Steps of this epoch, those before the segment included; infinite where its end has to be looked for."""
        if self.segment == WHOLE_EPOCH and not self.is_length_certain:
            return INFINITE
        return self.segment.first_batch + self._segment_length

    @property
    def _segment_length(self) -> float:
        if not self.shards_batches:
            return self.length
        return self._steps(self.source.length_in(self.segment))

    def _steps(self, batches: float) -> float:
        """In how many steps all ranks together read so many of the source's batches."""
        if not self.shards_batches or batches == INFINITE:
            return batches
        rounds, rest = divmod(int(batches), self.world_size)
        return rounds + (rest > 0 and not self.source.drop_last)

    def _first(self, step: int) -> int:
        """The first of the source's batches that this rank reads in a step of the segment."""
        if not self.shards_batches:
            return step
        first = 0 if self.length == INFINITE else self.rank
        return step * self.world_size + first

    @property
    def _unit(self) -> int:
        """By how much a step moves the position of all ranks."""
        ranks = self.world_size if self.shards_batches else 1
        return self.source.unit * ranks

    def place_of(self, epoch: int, batch_idx: int) -> LeftOut:
        """Which of an epoch's data all ranks read in a step; of another epoch than the running one, if it is whole."""
        segment = self.segment if epoch == self.epoch else WHOLE_EPOCH
        begin = segment.begin + (batch_idx - segment.first_batch) * self._unit
        return {
            "epoch": epoch,
            "begin": begin,
            "end": begin + self._unit,
            "in_samples": self.source.counts_samples,
        }

    def steps_with(self, data: LeftOut) -> range:
        """The steps of the running epoch in which any rank reads some of this data.

        Raises:
            CheckpointError: if it is counted in other units than this loader's.
        """
        if data["epoch"] != self.epoch:
            return range(0)
        if data["in_samples"] != self.source.counts_samples:
            raise CheckpointError(
                "the checkpoint leaves some of the epoch's data out, and the loader's sampler has been changed for one "
                "of another kind: resume with the same loader, or from a checkpoint of an epoch's end"
            )
        segment = self.segment
        begin = max(0, data["begin"] - segment.begin)
        end = max(0, data["end"] - segment.begin)
        first = begin // self._unit
        stop = -(-end // self._unit)
        return range(segment.first_batch + first, segment.first_batch + stop)

    def samples_of(self, epoch: int, batch_idx: int) -> list[Any] | None:
        """The indices in the dataset of the samples that this rank reads in a step; None where they are not known."""
        segment = self.segment if epoch == self.epoch else WHOLE_EPOCH
        number = batch_idx - segment.first_batch
        if self.shards_batches:
            number = number * self.world_size + self.rank
        return self.source.samples_of(epoch, number, segment)

    def state_dict(
        self,
        batch_idx: int,
        is_done: bool = False,
        limit: float | None = None,
    ) -> LoaderState:
        """The position after ``batch_idx`` batches of the epoch.

        Args:
            batch_idx: how many batches each rank has been given.
            is_done: whether the epoch is over, even if the loader would give more batches.
            limit: how many batches of a whole epoch each rank is to be given, if not all.
        """
        segment = self.segment
        unit = self._unit
        end: Any = segment.end
        if limit is not None and segment == WHOLE_EPOCH:
            end = limit * unit
        following = batch_idx - segment.first_batch
        own = self.source.state_dict(self._first(max(0, following)), is_done)
        return {
            "epoch": self.epoch,
            "batches": batch_idx,
            "loader": own,
            "part": segment.state_dict(),
            "cursor": {
                "position": segment.begin + following * unit,
                "end": end,
                "in_samples": self.source.counts_samples,
                "batch_sizes": self.source.batch_sizes,
                "dealt": self.shards_batches,
                "dealt_to": data_parallel_rank_and_size(self.strategy)[1],
            },
        }

    def load_state_dict(self, state: LoaderState, saved_by: int | None = None) -> None:
        """Go on from a position; ``saved_by`` tells how many processes saved it, if not as many as there are now.

        Raises:
            CheckpointError: if what they have left of the epoch cannot be sharded over these ranks.
        """
        world_size = self.strategy.world_size
        saved_by = saved_by or world_size
        cursor = state["cursor"]
        self.begin_epoch(state["epoch"], Segment.from_state(state["part"]))
        # At an epoch's begin, states of another number of ranks tell nothing of loaders that each rank has for itself.
        is_sharded = cursor is not None and cursor["dealt"] and self.shards_batches
        if state["batches"] or saved_by == world_size or is_sharded:
            self.source.load_state_dict(state["loader"])
        if state["batches"] and cursor is not None:
            self._reshard(cursor, state["batches"], saved_by)

    def _reshard(
        self,
        cursor: Cursor,
        batches: int,
        saved_by: int,
    ) -> None:
        """Shard what is left of an epoch anew, if the number of ranks or the batch size is another than before.

        Args:
            cursor: the saved position of all ranks.
            batches: how many batches each of them had been given.
            saved_by: how many ranks saved it, if the cursor does not tell.

        Raises:
            CheckpointError: if it cannot be sharded anew.
        """
        source = self.source
        world_size = data_parallel_rank_and_size(self.strategy)[1]
        saved_by = cursor.get("dealt_to", saved_by)
        if saved_by == world_size and cursor["batch_sizes"] == source.batch_sizes:
            return
        why = ""
        if not (cursor["dealt"] and self.shards_batches):
            why = "each process has a loader of its own (use_distributed_sampler=False, or a DistributedSampler)"
        elif cursor["in_samples"] != source.counts_samples:
            why = "the loader's sampler has been changed for one of another kind"
        elif not source.counts_samples and cursor["batch_sizes"] != source.batch_sizes:
            why = f"only its batches can be counted, whose sizes have been changed from {cursor['batch_sizes']} to "
            why += f"{source.batch_sizes}"
        if why:
            raise CheckpointError(
                f"the checkpoint was saved inside an epoch by {saved_by} process(es), now there are {world_size}, and "
                f"what is left of the epoch cannot be dealt out anew: {why}. Resume with {saved_by} and the same "
                "loaders, or from a checkpoint of an epoch's end"
            )
        self.segment = Segment(batches, cursor["position"], cursor["end"])

    # Batches -----------------------------------------------------------------------------------------------------

    def iterate(self, start: int = 0) -> Iterator[Any]:
        """Iterate this rank's batches of the epoch from step ``start``."""
        start -= self.segment.first_batch
        if self.strategy.world_size == 1:
            return self._read(start, 1)
        if self.length == INFINITE:
            batches = self._read(self._first(start), 1)
            if self.shards_batches:
                return self._agree(self._rounds(batches))
            return self._agree((batch, 1) for batch in batches)
        step = self.world_size if self.shards_batches else 1
        batches = self._read(self._first(start), step)
        if not self.source.has_own_iteration:
            return self._planned(batches, start)
        length = int(self._segment_length)
        weights = (self._planned_weight(step, length) for step in range(start, length))
        return self._agree(zip(batches, weights, strict=False))

    def _read(self, start: int, step: int) -> Iterator[Any]:
        return self.source.iterate(self.epoch, start, step, self.segment)

    def _planned(self, batches: Iterator[Any], start: int) -> Iterator[Any]:
        """The batches of an epoch whose length is known."""
        last = NO_BATCH
        length = int(self._segment_length)
        if not self.shards_batches and min(self._lengths) <= start < length:
            src_rank = self._lengths.index(length)
            own = list(islice(batches, 1)) if src_rank == self.rank else []
            last = self._first_of(own, src_rank)
            batches = chain(own, batches)
        for step in range(start, length):
            self.batch_weight = self._planned_weight(step, length)
            batch = next(batches, NO_BATCH)
            if batch is NO_BATCH:
                if self.batch_weight:
                    raise RuntimeError(
                        f"rank {self.rank}: the training loader has no batch {step} of the {length} that its "
                        "length promised; the other processes count on it"
                    )
                batch = self._borrow() if last is NO_BATCH else last
            if step == length - 2 or not self.shards_batches:
                last = batch
            if step == length - 1 and self.shards_batches and self.source.stateful:
                # A loader with a state begins the next epoch where it was left: let it be at its end on all ranks.
                next(batches, None)
            yield batch

    def _first_of(self, batches: list[Any], src_rank: int) -> Any:
        """The first of the batches that rank ``src_rank`` has; NO_BATCH if it has none. A collective."""
        first = batches[:1] if src_rank == self.strategy.global_rank else []
        given = self.strategy.broadcast(first, src_rank)  # collective
        return given[0] if given else NO_BATCH

    def _planned_weight(self, step: int, length: int) -> float:
        """The weight of this rank's batch in a step of an epoch of known length; 0.0 if it has none in that step."""
        if not self.shards_batches:
            present = sum(length > step for length in self._lengths)
            is_present = step < self._lengths[self.rank]
            return self.world_size / present if is_present else 0.0
        if step < length - 1:
            return 1.0
        batches = int(self.source.length_in(self.segment))
        present = min(self.world_size, batches - step * self.world_size)
        if self.rank >= present:
            return 0.0
        last_fraction = self.source.last_fraction_in(self.segment)
        fraction = last_fraction if self.rank == present - 1 else 1.0
        return self.world_size * fraction / (present - 1 + last_fraction)

    def _borrow(self) -> Any:
        """A batch of another rank, for one that has none to run again."""
        with isolated_rng():
            batch = next(self._read(0, 1), NO_BATCH)
        if batch is NO_BATCH:
            raise RuntimeError(f"rank {self.rank}: the training loader gave no batch")
        return batch

    def _marking(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches of a stream; until ranks have compared them, a hash of each is noted."""
        for batch in batches:
            if self._marks is not None:
                self._marks.append(fingerprint(batch))
            yield batch

    def _rounds(self, batches: Iterator[Any]) -> Iterator[tuple[Any, float]]:
        """This rank's batch of each round, or another's if it has none, and how many batches the round has."""
        while round_ := list(islice(batches, self.world_size)):
            number = self.rank if self.rank < len(round_) else 0
            yield round_[number], len(round_)

    def _agree(self, ahead: Iterator[tuple[Any, float]]) -> Iterator[Any]:
        """Give a batch in each step in which any rank has one. A collective every ``LOOK_AHEAD`` steps.

        Args:
            ahead: pairs. Where all ranks read all batches: this rank's batch of a round, and how many batches the round
                has. Else: a batch of this rank, and the weight that it has if no rank lacks one.
        """
        last = NO_BATCH
        in_rounds = self.shards_batches and self.length == INFINITE
        weigh = self._weight_in_round if in_rounds else self._weight_among
        read = [0.0] * self.strategy.world_size
        while True:
            self._marks = [] if self._compares else None
            own = list(islice(ahead, LOOK_AHEAD))
            counts = self._exchange([count for _, count in own], read, in_rounds)
            steps = max(map(len, counts))
            batches = [batch for batch, _ in own]
            if last is NO_BATCH and steps and not all(counts):
                first = next(rank for rank, given in enumerate(counts) if given)
                last = self._first_of(batches, first)
            for step in range(steps):
                self.batch_weight = weigh(counts, step)
                last = batches[step] if step < len(batches) else last
                yield last
            if steps < LOOK_AHEAD:
                return

    def _exchange(
        self,
        own: list[float],
        read: list[float],
        in_rounds: bool,
    ) -> list[list[float]]:
        """What each rank sees ahead: the number that :meth:`_agree` has beside each batch. A collective.

        Args:
            own: what this rank sees.
            read: by rank, the sum of these numbers until now, for the message; what they see now is added.
            in_rounds: whether all ranks read all batches.

        Raises:
            RuntimeError: if they see different things though they read all batches.
        """
        by_rank = self.strategy.gather_objects((own, self._marks))  # collective
        self._compares = False
        self._marks = None
        counts = [counts for counts, _ in by_rank]
        for rank, seen in enumerate(counts):
            read[rank] += sum(seen)
        if in_rounds and any(other != by_rank[0] for other in by_rank):
            raise different_streams(read, "training loader")
        return counts

    def _weight_in_round(self, counts: list[list[float]], step: int) -> float:
        """This rank's weight in a round that all ranks read: those that have a batch in it count alike."""
        batches = counts[0][step]
        return self.world_size / batches if self.rank < batches else 0.0

    def _weight_among(self, counts: list[list[float]], step: int) -> float:
        """This rank's weight in a step in which each rank has a batch of its own loader, or none any more."""
        weights = [given[step] if step < len(given) else 0.0 for given in counts]
        own = weights[self.strategy.global_rank]
        return self.world_size * own / sum(weights) if own else 0.0

    def close(self) -> None:
        """End the loader's workers."""
        self.source.close()


def noting_end(batches: Iterator[Any], ends: list[tuple[int, str]]) -> Iterator[Any]:
    """The same batches; ``ends`` gets how many there are and a hash of the last one, before a step can change that."""
    pairs = pairwise(chain(batches, (NO_BATCH,)))
    for number, (batch, following) in enumerate(pairs, 1):
        if following is NO_BATCH:
            ends.append((number, fingerprint(batch)))
        yield batch


def different_streams(read: Iterable[float], name: str) -> RuntimeError:
    """The error for a stream whose batches are sharded, though each rank reads another stream."""
    return RuntimeError(
        f"the processes read different streams from what should be one {name} (until now {_counted(read)}); if the "
        "dataset gives each process its own part, pass use_distributed_sampler=False"
    )


def require_equal_lengths(lengths: list[float], name: str) -> None:
    """A loader whose batches are sharded must be the same on all ranks.

    Raises:
        ValueError: if its lengths differ.
    """
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{name} has {_counted(lengths)}: the same data must be there in all processes, which are given their "
            "parts of it; if each has its own data, pass use_distributed_sampler=False"
        )


def _counted(by_rank: Iterable[float]) -> str:
    return ", ".join(
        f"{batches:.0f} batches on rank {rank}" for rank, batches in enumerate(by_rank)
    )
