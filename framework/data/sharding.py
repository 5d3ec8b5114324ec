"""How the batches of a run are dealt out to its processes, so that all of them take the same number of steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..messages import log
from ..seed import isolated_rng
from .iteration import INFINITE, NO_BATCH, is_map_style
from .position import WHOLE_EPOCH, Segment
from .shard_detection import draw_alike, fingerprint, is_sharded
from .sources import BatchSource

if TYPE_CHECKING:
    from ...strategies import Strategy

# Where nobody knows how many batches there are, the processes tell each other after so many steps how far they can see.
LOOK_AHEAD = 8


def data_place(strategy: Strategy) -> tuple[int, int]:
    """This process's index among those that get different batches, and their number."""
    size = strategy.tensor_parallel_size
    return strategy.global_rank // size, strategy.world_size // size


class SharedLoader:
    """A training loader as one of several processes reads it.

    The batches of the user's loader are dealt out in turn: rank *r* of *W* gets batches *r*, *r + W*, *r + 2W*, … So
    each process has batches of the loader's own size, and each sample is read once. If the last round is incomplete,
    the processes without a batch run their last one again, with a :attr:`share` of 0, to stay in step; those that have
    one weigh by size, so that the gradient is the mean over the round's samples. ``drop_last`` leaves that round out.

    A loader that each process has for its own (``deal=False``) is read to its end, and the others wait in the same way.

    Args:
        loader: the loader, as it is in each process.
        strategy: tells this process's rank, and lets it talk to the others.
        deal: whether all processes have the same loader.
        verify: compare the first batches of a stream, to see that it is the same in all processes.

    Attributes:
        length: steps of an epoch, the same in all processes; infinite if that is not certain.
        told_length: the same, as the loader tells it.
        share: what to multiply the loss of the batch given last with, before the processes' gradients are averaged.

    Raises:
        ValueError: if a loader that is to be dealt out has different lengths.
    """

    def __init__(
        self,
        loader: BatchSource,
        strategy: Strategy,
        deal: bool,
        verify: bool = False,
    ) -> None:
        self.loader, self.strategy, self.deal = loader, strategy, deal
        self.rank, self.world_size = (
            data_place(strategy)
            if deal
            else (strategy.global_rank, strategy.world_size)
        )
        told = strategy.gather_objects(
            (loader.length, loader.told_length)
        )  # a collective
        self.lengths: list[int | float] = [length for length, _ in told]
        self.share = 1.0
        if deal:
            require_equal_lengths(self.lengths, "the training loader")
        self.length = self._steps(max(self.lengths))
        self.told_length = self._steps(max(told_length for _, told_length in told))
        self._verify = verify and deal and self.length == INFINITE
        self._marks: list[str] | None = (
            None  # of the batches that are read ahead, to be compared
        )
        self.take(loader)

    def take(self, loader: BatchSource) -> None:
        """Read ``loader``, which is like the one before but for its seed."""
        self.loader = loader
        is_ahead = self.length == INFINITE or loader.has_own_iteration
        loader.read_ahead(is_ahead, () if self.deal else (self.strategy.global_rank,))
        for part in loader.parts:
            # The augmentation of what is map-style may differ.
            if self._verify and part.is_stream and not is_map_style(part.loader):
                part.watch(self._marking)

    def length_in(self, segment: Segment) -> int | float:
        """Steps of a segment of an epoch, the same in all processes."""
        return self._steps(self.loader.length_in(segment)) if self.deal else self.length

    def _steps(self, batches: int | float) -> int | float:
        if not self.deal or batches == INFINITE:
            return batches
        rounds, rest = divmod(int(batches), self.world_size)
        return rounds + (rest > 0 and not self.loader.drop_last)

    def iterate(
        self, epoch: int, start: int = 0, segment: Segment = WHOLE_EPOCH
    ) -> Iterator[Any]:
        """Iterate this process's batches of a segment of epoch ``epoch`` from its step ``start``."""
        if self.length == INFINITE:
            batches = self.loader.iterate(epoch, self._first(start), segment=segment)
            return self._agree(
                self._rounds(batches)
                if self.deal
                else ((batch, 1) for batch in batches)
            )
        batches = self.loader.iterate(
            epoch, self._first(start), self.world_size if self.deal else 1, segment
        )
        if not self.loader.has_own_iteration:
            return self._planned(batches, epoch, start, segment)
        length = int(self.length_in(segment))
        steps = range(start, length)
        return self._agree(
            (batch, self._share_of(step, segment, length))
            for batch, step in zip(batches, steps, strict=False)
        )

    def _first(self, step: int) -> int:
        """The first of the loader's batches that this process reads in a step."""
        if not self.deal:
            return step
        return step * self.world_size + (0 if self.length == INFINITE else self.rank)

    # -- known lengths ----------------------------------------------------------------------------------------

    def _planned(
        self, batches: Iterator[Any], epoch: int, start: int, segment: Segment
    ) -> Iterator[Any]:
        last = NO_BATCH
        length = int(self.length_in(segment))
        if not self.deal and min(self.lengths) <= start < length:
            batches, last = self._share_batch(batches, self.lengths.index(length))
        for step in range(start, length):
            self.share = self._share_of(step, segment, length)
            batch = next(batches, NO_BATCH)
            if batch is NO_BATCH:
                if self.share:
                    raise RuntimeError(
                        f"rank {self.rank}: the training loader has no batch {step} of the {length} that its "
                        "length promised; the other processes count on it"
                    )
                batch = self._borrow(epoch, segment) if last is NO_BATCH else last
            if step == length - 2 or not self.deal:
                last = batch
            if step == length - 1 and self.deal and self.loader.stateful:
                next(
                    batches, None
                )  # one that begins where it was left must be at its end in all processes
            yield batch

    def _share_batch(
        self, batches: Iterator[Any], source: int
    ) -> tuple[Iterator[Any], Any]:
        """This process's batches as they are, and the next one of rank ``source``, or NO_BATCH. A collective."""
        own = [*islice(batches, 1)] if source == self.strategy.global_rank else []
        given = self.strategy.broadcast(own, source)
        return chain(own, batches), given[0] if given else NO_BATCH

    def _share_of(self, step: int, segment: Segment, length: int) -> float:
        if not self.deal:
            present = sum(length > step for length in self.lengths)
            return self.world_size / present if step < self.lengths[self.rank] else 0.0
        if step < length - 1:
            return 1.0
        present = min(
            self.world_size,
            int(self.loader.length_in(segment)) - step * self.world_size,
        )
        if self.rank >= present:
            return 0.0
        last_fraction = self.loader.last_fraction_in(segment)
        return (
            self.world_size
            * (last_fraction if self.rank == present - 1 else 1.0)
            / (present - 1 + last_fraction)
        )

    def _borrow(self, epoch: int, segment: Segment) -> Any:
        """A batch of another process, for one that has none to run again."""
        with isolated_rng():
            batch = next(self.loader.iterate(epoch, segment=segment), NO_BATCH)
        if batch is NO_BATCH:
            raise RuntimeError(f"rank {self.rank}: the training loader gave no batch")
        return batch

    # -- unknown lengths --------------------------------------------------------------------------------------

    def _marking(self, batches: Iterator[Any]) -> Iterator[Any]:
        """A stream's batches; what the first ones hold is kept, to be compared."""
        for batch in batches:
            if self._marks is not None:
                self._marks.append(fingerprint(batch))
            yield batch

    def _rounds(self, batches: Iterator[Any]) -> Iterator[tuple[Any, float]]:
        """This process's batch of each round, or another's if it has none, and how many batches the round has."""
        while round_ := list(islice(batches, self.world_size)):
            yield (
                round_[self.rank] if self.rank < len(round_) else round_[0],
                len(round_),
            )

    def _agree(self, ahead: Iterator[tuple[Any, float]]) -> Iterator[Any]:
        """Take so many steps as the process that sees most. A collective every ``LOOK_AHEAD`` steps.

        Args:
            ahead: pairs. Where all processes read all batches: this process's batch of a round, and how many batches
                the round has. Else: a batch of this process, and the share that it has if no process lacks one.
        """
        last = NO_BATCH
        in_rounds = self.deal and self.length == INFINITE
        read = [0.0] * self.strategy.world_size
        while True:
            self._marks = [] if self._verify else None
            own = list(islice(ahead, LOOK_AHEAD))
            by_rank = self.strategy.gather_objects(
                ([count for _, count in own], self._marks)
            )
            counts: list[list[float]] = [counts for counts, _ in by_rank]
            read = [before + sum(new) for before, new in zip(read, counts, strict=True)]
            if in_rounds and any(other != by_rank[0] for other in by_rank):
                raise different_streams(read, "training loader")
            self._verify, self._marks = False, None
            steps = max(map(len, counts))
            if last is NO_BATCH and steps and not all(counts):
                source = next(rank for rank, given in enumerate(counts) if given)
                last = self._share_batch(iter([batch for batch, _ in own]), source)[1]
            for step in range(steps):
                self.share = (
                    self._share_in_round(counts, step)
                    if in_rounds
                    else self._share_among(counts, step)
                )
                last = own[step][0] if step < len(own) else last
                yield last
            if steps < LOOK_AHEAD:
                return

    def _share_in_round(self, counts: list[list[float]], step: int) -> float:
        """Of a round that all processes read: those for whom it has a batch count alike."""
        batches = counts[0][step]
        return self.world_size / batches if self.rank < batches else 0.0

    def _share_among(self, counts: list[list[float]], step: int) -> float:
        """Of a step in which each process has its own batch, or none any more."""
        shares = [given[step] if step < len(given) else 0.0 for given in counts]
        own = shares[self.strategy.global_rank]
        return self.world_size * own / sum(shares) if own else 0.0

    # -- as the loader ----------------------------------------------------------------------------------------

    def require_resumable(self) -> None:
        """As :meth:`BatchSource.require_resumable`."""
        self.loader.require_resumable()

    def close(self) -> None:
        """End its workers."""
        self.loader.close()

    def state_dict(self, following: int | None = None, done: bool = False) -> Any:
        """The loader's own state, as :meth:`BatchSource.state_dict`; ``following`` counts steps."""
        return self.loader.state_dict(
            None if following is None else self._first(following), done
        )

    def load_state_dict(self, state: Any) -> None:
        """Take back :meth:`state_dict`."""
        self.loader.load_state_dict(state)


def noting_end(batches: Iterator[Any], ends: list[tuple[int, str]]) -> Iterator[Any]:
    """The same batches; ``ends`` gets their number and a hash of the last one, taken before a step can change it."""
    number = 0
    batch = next(batches, NO_BATCH)
    while batch is not NO_BATCH:
        number += 1
        following = next(batches, NO_BATCH)
        if following is NO_BATCH:
            ends.append((number, fingerprint(batch)))
        yield batch
        batch = following


def different_streams(read: Iterable[float], name: str) -> RuntimeError:
    """The error of a stream that was dealt out, and is another one in each process."""
    counted = ", ".join(
        f"{int(batches)} batches on rank {rank}" for rank, batches in enumerate(read)
    )
    return RuntimeError(
        f"the processes read different streams from what should be one {name} (until now {counted}); if the dataset "
        "gives each process its own part, pass use_distributed_sampler=False"
    )


def gives_parts(
    loader: BatchSource,
    strategy: Strategy,
    asked: bool | None,
    epoch: int,
    name: str,
    cursor: dict[str, Any] | None = None,
    mixed: bool = True,
) -> bool:
    """Whether a loader gives each process a part of its own, so that it is not to be dealt out.

    Of loaders that are read together, some may do so, while others give all of the data: those are then dealt out one
    by one.

    Args:
        loader: the loader, as it is in each process.
        strategy: as of :class:`SharedLoader`.
        asked: ``use_distributed_sampler``, as the user gave it; None lets the processes find out.
        epoch: the epoch that begins.
        name: what to call the loader in messages.
        cursor: of the checkpoint from which it is to go on, if there is one. A loader that keeps its own state is not
            read to find out what the processes that saved it knew.
        mixed: whether loaders that are read together may differ.

    Raises:
        ValueError: if some of several loaders do, and others not, where they may not differ.
    """
    parts = loader.parts
    if (
        asked is None
        and cursor is not None
        and cursor["dealt_to"] > 1
        and any(part.stateful for part in parts)
    ):
        asked = bool(cursor["dealt"])
    sharded = []
    for index, part in enumerate(parts):
        if asked is not False:
            draw_alike(part, strategy)
        part_name = name if len(parts) == 1 else f"{name}'s part {index}"
        sharded.append(is_sharded(part, strategy, asked, epoch, part_name))
        part.plan_steps()
    if len(set(sharded)) == 1:
        return any(sharded)
    if not mixed:
        found = ", ".join(
            "its own part" if own else "all of the data" for own in sharded
        )
        raise ValueError(
            f"of the loaders that are read together as {name}, some give each process its own part, and others all of "
            f"the data (in their order: {found}): give the others a DistributedSampler, too"
        )
    log.info(
        "Those parts of the %s that give all of the data are dealt out; the others are read as they are",
        name,
    )
    for part, own in zip(parts, sharded, strict=True):
        if not own:
            part.read_shard(*data_place(strategy))
    return True


def require_equal_lengths(lengths: list[int | float], name: str) -> None:
    """A loader that is dealt out must be the same in all processes.

    Raises:
        ValueError: if its lengths differ.
    """
    if len(set(lengths)) > 1:
        told = ", ".join(
            f"{length} batches on rank {rank}" for rank, length in enumerate(lengths)
        )
        raise ValueError(
            f"{name} has {told}: the same data must be there in all processes, which are given their parts of it; if "
            "each has its own data, pass use_distributed_sampler=False"
        )


def cursor_of(
    source: BatchSource | SharedLoader,
    world_size: int,
    batches: int,
    segment: Segment,
    limit: int | float | None = None,
) -> dict[str, Any]:
    """How much of an epoch's data all processes have been given.

    Args:
        source: the training loader, as this process reads it.
        world_size: how many processes get different batches.
        batches: given to each of them in this epoch.
        segment: what these processes read of the epoch.
        limit: how many batches of a whole epoch each is to be given, if not all.

    Returns:
        ``position`` and ``end`` (None for all of the epoch), both in samples where the order is planned, else in the
        loader's batches; and what is needed to tell whether they mean the same in another run.
    """
    loader, dealt = _loader_of(source)
    each = loader.unit * (world_size if dealt else 1)
    end: Any = segment.end
    if limit is not None and segment == WHOLE_EPOCH:
        end = limit * each
    return {
        "position": segment.begin + (batches - segment.first_batch) * each,
        "end": end,
        "in_samples": loader.counts_samples,
        "batch_sizes": loader.batch_sizes,
        "dealt": dealt,
        "dealt_to": world_size,
    }


def rest_of_epoch(
    cursor: dict[str, Any], source: Any, saved_by: int, world_size: int, batches: int
) -> Segment | None:
    """What is left of an epoch that other processes have begun, or the same ones with another batch size.

    Args:
        cursor: what :func:`cursor_of` gave there.
        source: the training loader, as this process reads it now.
        saved_by: how many processes they were.
        world_size: how many of those that there are now get different batches.
        batches: given to each of them in this epoch.

    Returns:
        The segment to go on with; None if nothing has changed.

    Raises:
        CheckpointError: if it cannot be dealt out anew.
    """
    loader, dealt = _loader_of(source)
    saved_by = cursor.get("dealt_to", saved_by)
    if saved_by == world_size and cursor["batch_sizes"] == loader.batch_sizes:
        return None
    why = ""
    if not (cursor["dealt"] and dealt):
        why = "each process has a loader of its own (use_distributed_sampler=False, or a DistributedSampler)"
    elif cursor["in_samples"] != loader.counts_samples:
        why = "the loader's sampler has been changed for one of another kind"
    elif not loader.counts_samples and cursor["batch_sizes"] != loader.batch_sizes:
        why = f"only its batches can be counted, whose sizes have been changed from {cursor['batch_sizes']} to "
        why += f"{loader.batch_sizes}"
    if why:
        raise CheckpointError(
            f"the checkpoint was saved inside an epoch by {saved_by} process(es), now there are {world_size}, and what "
            f"is left of the epoch cannot be dealt out anew: {why}. Resume with {saved_by} and the same loaders, or "
            "from a checkpoint of an epoch's end"
        )
    return Segment(batches, cursor["position"], cursor["end"])


def _loader_of(
    source: BatchSource | SharedLoader,
) -> tuple[Any, bool]:
    if isinstance(source, SharedLoader):
        return source.loader, source.deal
    return source, True
