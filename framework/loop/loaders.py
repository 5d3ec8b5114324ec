"""Where a run's batches come from: the loaders of each stage, how many batches of them, and how they are moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Any

import torch

from ..data.batches import map_tensors
from ..data.combined import (
    CombinedLoader,
    exact_length_of,
    holds_loaders,
    loaders_in,
    source_of,
)
from ..data.iteration import INFINITE, NO_BATCH, loader_length, may_give_more, up_to
from ..data.position import WHOLE_EPOCH, Segment
from ..data.sampler import own_copy
from ..data.sharding import (
    SharedLoader,
    cursor_of,
    data_place,
    different_streams,
    gives_parts,
    noting_end,
    require_equal_lengths,
    rest_of_epoch,
)
from ..data.sources import BatchSource, kept_iterator_source
from ..data.workers import iterate_protected
from ..datamodule import DataModule
from ..messages import log
from ..module import Module
from ..seed import isolated_rng
from ..subclasses import overrides

if TYPE_CHECKING:
    from ..trainer import Trainer

LOADER_METHODS = {
    "train": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


class RunData:
    """The loaders of a run.

    Attributes:
        given: the loaders passed to ``fit``, ``test`` and so on, by stage.
        loaders: by stage, the user's loaders as they are: one object for training, a list for the others.
        train: the training loader as the loop iterates it.
        max_batches: by stage, how many batches to run here at most: a number for training, a list for the others.
            Infinite where a loader is read to its end.
        num_batches: the same, with what loaders tell where that is not certain.
        whole_epoch: training batches in an epoch at most, were the running one not taken up from other processes.
        looks_ahead: whether the number of training batches is not certain, so that their end has to be looked for.
        alone: whether the running evaluation step is one that other processes have no batch for.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: Module,
        datamodule: DataModule | None,
        given: dict[str, Any],
    ) -> None:
        self.trainer, self.module, self.datamodule, self.given = (
            trainer,
            module,
            datamodule,
            given,
        )
        self.loaders: dict[str, Any] = {}
        self.max_batches: dict[str, Any] = {}
        self.num_batches: dict[str, Any] = {}
        self.whole_epoch: int | float = INFINITE
        self.looks_ahead = False
        self.train: BatchSource | SharedLoader | None = None
        self._parts: dict[
            str, list[Any]
        ] = {}  # by stage, what gives this process its batches, if there are others
        # By stage and index, iterations of evaluation loaders that have been begun, to see that they are not dealt out.
        self._opened: dict[tuple[str, int], Iterator[Any] | None] = {}
        self._iterated: dict[
            str, list[Any]
        ] = {}  # by stage, what is iterated otherwise
        self.loaded_in_epoch: dict[str, int] = {}
        self._begun: int | None = None  # the epoch that is iterated
        # Stages and loaders of which a line has said that there are more batches than they tell.
        self._said: set[Any] = set()
        self._ends: dict[
            str, list[tuple[int, str]]
        ] = {}  # of streams that are dealt out, by name; see `noting_end`
        self.alone = False
        self._in_all: dict[
            str, list[int | float]
        ] = {}  # by stage, how many batches each process has at least
        self._in_any: dict[str, list[int | float]] = {}  # and at most

    def has(self, stage: str) -> bool:
        """Whether there is a loader for ``stage``, as far as is known before it is made."""
        empty = self.loaders.get(stage) == [] and not self.stale(
            stage, self.trainer.reload_dataloaders_every_n_epochs
        )
        return self._source(stage) is not None and not empty

    def _source(self, stage: str) -> Callable[[], Any] | None:
        name = LOADER_METHODS[stage]
        if (given := self.given.get(stage)) is not None:
            return lambda: given
        for owner, base in ((self.datamodule, DataModule), (self.module, Module)):
            if owner is not None and overrides(owner, name, base):
                return getattr(owner, name)
        return None

    # -- training ---------------------------------------------------------------------------------------------

    def load_train(self, again: bool = False) -> None:
        """Make the training loader, once.

        Raises:
            ValueError: if it is empty, or the limit does not go with it.
        """
        if self.train is not None and not again:
            return
        trainer = self.trainer
        if trainer.limit_train_batches == 0:
            self.max_batches["train"] = self.num_batches["train"] = 0
            return
        source = self._source("train")
        if (
            source is None
        ):  # found before a fit; but other runs can be asked for their training batches, too
            raise RuntimeError(
                "there is no training loader whose batches could be counted"
            )
        loaders = self.loaders["train"] = source()
        self.loaded_in_epoch["train"] = trainer.state.epoch
        combined = loaders
        if _is_collection(loaders):
            combined = CombinedLoader(loaders, "max_size_cycle")
        self.train = source_of(
            combined, trainer.state.draw_seed(), shuffle=not trainer.overfit_batches
        )
        if trainer.world_size > 1:
            epoch = trainer.state.epoch + trainer.state.epoch_done  # that which begins
            resumed = trainer.run.resumed
            cursor = resumed["cursor"] if resumed is not None else None
            asked = trainer.use_distributed_sampler
            own = gives_parts(
                self.train, trainer.strategy, asked, epoch, "training loader", cursor
            )
            self.train = SharedLoader(
                self.train, trainer.strategy, deal=not own, verify=asked is None
            )
        self.begin_epoch()
        if self.train.length == 0:
            raise ValueError(
                "the training loader is empty (its length is 0): check its dataset, and batch_size with drop_last=True"
            )

    @property
    def segment(self) -> Segment:
        """What these processes read of the running epoch."""
        return Segment.from_state(self.trainer.state.part)

    def begin_epoch(self) -> None:
        """Count the batches of the running epoch."""
        if self.train is None:
            return
        train = self.train
        segment = self.segment
        exact = train.length
        if not isinstance(train, SharedLoader):
            exact = exact_length_of(train.loader, trusts_samplers=False)
        self.looks_ahead = exact == INFINITE
        limit = self.trainer.limit_train_batches
        self.whole_epoch, told = limited_to(
            exact, train.told_length, limit, "limit_train_batches"
        )
        self.max_batches["train"] = self.whole_epoch
        self.num_batches["train"] = told
        if segment != WHOLE_EPOCH:
            length = segment.first_batch + train.length_in(segment)
            self.max_batches["train"] = length
            if length < INFINITE:
                self.num_batches["train"] = length

    def iterate_train(self) -> Iterator[Any]:
        """Iterate the running epoch from the data cursor on."""
        assert self.train is not None
        state = self.trainer.state
        segment = self.segment
        self._begun = state.epoch
        start = state.batch_idx - segment.first_batch
        batches = self.train.iterate(state.epoch, start, segment=segment)
        if not self.looks_ahead:
            return batches
        return self._noting_more(
            batches,
            self.train.told_length - state.batch_idx,
            "train",
            self.train.told_length,
        )

    def cursor(self, batch_idx: int) -> dict[str, Any] | None:
        """How far all processes are in the running epoch after ``batch_idx`` batches each."""
        if self.train is None:
            return None
        most = self.max_batches["train"]
        end = most if most < self.train.length else None
        return cursor_of(
            self.train,
            data_place(self.trainer.strategy)[1],
            batch_idx,
            self.segment,
            end,
        )

    def loader_state(self, batch_idx: int) -> Any:
        """The training loader's own state, to go on after ``batch_idx`` batches of the running epoch."""
        if self.train is None:
            return None
        state = self.trainer.state
        following = max(0, batch_idx - self.segment.first_batch)
        done = state.batches_done or self._begun != state.epoch
        return self.train.state_dict(following, done)

    def restore_loader(self, saved: dict[str, Any]) -> None:
        """Go on as the processes of a checkpoint would, inside an epoch or with the next one.

        Raises:
            CheckpointError: if what they have left of an epoch cannot be dealt out to those that there are now.
        """
        trainer, state, train = self.trainer, self.trainer.state, self.train
        assert train is not None
        cursor, saved_by = saved["cursor"], saved["saved_by"]
        # Of an epoch's end, others' states tell nothing about loaders that each process has for its own.
        dealt = (
            cursor is not None
            and cursor["dealt"]
            and (not isinstance(train, SharedLoader) or train.deal)
        )
        if state.batch_idx or saved_by == trainer.world_size or dealt:
            train.load_state_dict(saved["loader"])
        if not state.batch_idx or cursor is None:
            return
        if not state.batches_done:
            train.require_resumable()
        size = data_place(trainer.strategy)[1]
        rest = rest_of_epoch(cursor, train, saved_by, size, state.batch_idx)
        if rest is None:
            return
        state.part = rest.state_dict()
        self.begin_epoch()
        log.info(
            "Resuming inside epoch %d: what is left of it for %d process(es), which %d began, is %s batches each",
            state.epoch, trainer.world_size, saved_by, self.max_batches["train"] - state.batch_idx,
        )  # fmt: skip

    def _noting_more(
        self, batches: Iterator[Any], left: int | float, stage: str, told: int | float
    ) -> Iterator[Any]:
        """The same batches; a line says once that they are more than the loader tells."""
        if left == INFINITE or not told or stage in self._said:
            return batches
        return chain(
            islice(batches, max(0, int(left))), self._more(batches, stage, told)
        )

    def _more(
        self, batches: Iterator[Any], stage: str, told: int | float
    ) -> Iterator[Any]:
        for batch in islice(batches, 1):
            self._said.add(stage)
            log.info(
                "A loader (%s) gives more than the %d batches that its length tells; it is read to its end. To end "
                "there, set %s=%d", stage, told, _limit_of(stage), told,
            )  # fmt: skip
            yield batch
        yield from batches

    # -- evaluation -------------------------------------------------------------------------------------------

    def load(self, stage: str, limit: int | float, again: bool = False) -> bool:
        """Make the loaders of ``"validate"``, ``"test"`` or ``"predict"``, once; False if there are none to run."""
        if limit == 0:
            self.max_batches.setdefault(stage, [])
            self.num_batches.setdefault(stage, [])
            return False
        if stage not in self.loaders or again:
            self._make(stage)
        loaders = self.loaders[stage]
        parts = self._parts.get(stage, [None] * len(loaders))
        world_size = data_place(self.trainer.strategy)[1]
        exact = [
            exact_length_of(loader, trusts_samplers=world_size > 1)
            for loader in loaders
        ]
        for index, (length, part) in enumerate(zip(exact, parts, strict=True)):
            if length == 0 and (
                world_size == 1 or part is not None
            ):  # a process's own part of the data may be empty
                raise ValueError(
                    f"{stage} loader {index} is empty (its length is 0): check its dataset"
                )
        name = _limit_of(stage)
        both = [
            limited_to(length, loader_length(loader), limit, name)
            for length, loader in zip(exact, loaders, strict=True)
        ]
        self.max_batches[stage] = [
            self._own(most, part) for (most, _), part in zip(both, parts, strict=True)
        ]
        self.num_batches[stage] = [
            self._own(told, part) for (_, told), part in zip(both, parts, strict=True)
        ]
        certain = [
            most if length < INFINITE else INFINITE
            for most, length in zip(self.max_batches[stage], exact, strict=True)
        ]
        told = self.trainer.strategy.gather_objects((exact, certain))  # a collective
        for index, lengths in enumerate(zip(*(own for own, _ in told), strict=True)):
            if parts[index] is not None:
                require_equal_lengths(list(lengths), f"{stage} loader {index}")
        by_rank = [counts for _, counts in told]
        # Where nobody knows, there is none that each process is sure to have.
        self._in_all[stage] = [
            INFINITE if len(by_rank) == 1 else 0 if INFINITE in counts else min(counts)
            for counts in zip(*by_rank, strict=True)
        ]
        self._in_any[stage] = [max(counts) for counts in zip(*by_rank, strict=True)]
        return bool(loaders)

    def _make(self, stage: str) -> None:
        """Make the loaders of an evaluation; an empty list where there are none."""
        source = self._source(stage)
        given = source() if source is not None else None
        if isinstance(given, CombinedLoader):
            loaders = given.flattened if given.mode == "sequential" else [given]
        elif given is None or (isinstance(given, (list, tuple)) and not given):
            loaders = []
        else:
            loaders = loaders_in(given) if _is_collection(given) else [given]
        self.loaders[stage] = list(loaders)
        self.loaded_in_epoch[stage] = self.trainer.state.epoch
        self._close(stage)
        self._iterated[stage] = [own_copy(loader) for loader in loaders]
        if self.trainer.world_size > 1:
            self._deal(stage)
        else:
            self._parts[stage] = [kept_iterator_source(loader) for loader in loaders]

    def _own(self, batches: int | float, part: Any) -> int | float:
        """How many of a loader's batches this process has."""
        if part is None or batches == INFINITE:
            return batches
        rank, world_size = data_place(self.trainer.strategy)
        return len(range(rank, int(batches), world_size))

    def _deal(self, stage: str) -> None:
        """Find out which evaluation loaders are to be dealt out to the processes."""
        trainer, loaders = self.trainer, self.loaders[stage]
        counts = trainer.strategy.gather_objects(len(loaders))  # a collective
        if len(set(counts)) > 1:
            raise ValueError(
                f"the processes have different numbers of {stage} loaders, by rank: {counts}"
            )
        self._parts[stage] = []
        for index, loader in enumerate(loaders):
            part = source_of(loader, trainer.state.draw_seed())
            asked, name = trainer.use_distributed_sampler, f"{stage} loader {index}"
            own = gives_parts(part, trainer.strategy, asked, 0, name, mixed=False)
            self._parts[stage].append(None if own else part)
            self._opened[stage, index] = part.begun_iteration() if own else None

    def load_validation(self) -> bool:
        """Make the validation loaders if validation runs in this epoch; False if there is nothing to validate on."""
        trainer = self.trainer
        if not trainer.enable_validation:
            return False
        again = self.stale("validate", trainer.reload_dataloaders_every_n_epochs)
        return self.load("validate", trainer.limit_val_batches, again)

    def evaluation_batches(
        self, stage: str, index: int, limit: int | float
    ) -> Iterator[tuple[Any, bool]]:
        """At most ``limit`` batches of an evaluation loader, and whether each is a dummy."""
        in_all, num_batches = self._in_all[stage][index], 0
        for batch, is_dummy in self._batches(stage, index, limit):
            if not is_dummy:
                self.alone = num_batches >= in_all
                num_batches += 1
            yield batch, is_dummy

    def end_evaluation(self) -> None:
        """All loaders have been evaluated on.

        Raises:
            RuntimeError: as of :meth:`check_streams`.
        """
        self.alone = False
        self.check_streams()

    def _batches(
        self, stage: str, index: int, limit: int | float
    ) -> Iterator[tuple[Any, bool]]:
        if (
            self.trainer.strategy.capabilities.needs_equal_forwards
            and self.trainer.world_size > 1
        ):
            return self._in_step(stage, index, limit)
        batches = self.begin(stage, index, limit) if limit else ()
        return (
            (batch, False)
            for batch in islice(batches, None if limit == INFINITE else int(limit))
        )

    def _in_step(
        self, stage: str, index: int, limit: int | float
    ) -> Iterator[tuple[Any, bool]]:
        """As many batches of an evaluation loader as the process with most has, and whether each is a dummy.

        A dummy is this process's last batch once more, or a batch of another's.
        """
        strategy, rounds = self.trainer.strategy, self._in_any[stage][index]
        own = (
            islice(
                self.begin(stage, index, limit),
                None if limit == INFINITE else int(limit),
            )
            if limit
            else iter(())
        )
        last = NO_BATCH
        for _ in count() if rounds == INFINITE else range(int(rounds)):
            batch = next(own, NO_BATCH)
            if rounds == INFINITE and not strategy.reduce(
                torch.tensor(int(batch is not NO_BATCH)), "max"
            ):
                return  # a collective for each batch, where nobody knows how many there are
            last = batch if batch is not NO_BATCH else last
            if last is NO_BATCH:
                part = (self._parts.get(stage) or [None])[index]
                with isolated_rng():
                    last = next(iter(() if part is None else part.iterate(0)), NO_BATCH)
                if last is NO_BATCH:
                    raise RuntimeError(
                        f"rank {strategy.global_rank} has no batch in {stage} loader {index}, and strategy="
                        f"{strategy.name!r} needs one in each process, as they meet in each forward pass"
                    )
            yield last, batch is NO_BATCH

    def begin(self, stage: str, index: int, limit: int | float) -> Iterator[Any]:
        """Iterate an evaluation loader: all of it, or this process's part: every n-th batch of n processes."""
        loader, parts = self._iterated[stage][index], self._parts.get(stage)
        part = parts[index] if parts else None
        # Workers that persist take their seeds when they start, in the first evaluation of a process, be it a resumed
        # one: that must not take a number from the training's generator.
        with (
            isolated_rng()
            if getattr(loader, "persistent_workers", False)
            else nullcontext()
        ):
            if part is None:
                opened = self._opened.get(
                    (stage, index)
                )  # which was begun to find out whether to deal it out
                batches = iterate_protected(loader) if opened is None else opened
                self._opened[stage, index] = None
            else:
                if (
                    limit == INFINITE
                    and self.trainer.world_size > 1
                    and self.trainer.use_distributed_sampler is None
                ):
                    self._watch(part, f"{stage} loader {index}")
                batches = part.iterate(0, *data_place(self.trainer.strategy))
        if part is None and may_give_more(loader):
            exact = exact_length_of(loader, trusts_samplers=self.trainer.world_size > 1)
            if 0 < exact < INFINITE:
                return up_to(loader, batches, int(exact), int(exact), self._said)
        told = loader_length(loader)
        return self._noting_more(batches, self._own(told, part), stage, told)

    def _watch(self, part: Any, name: str) -> None:
        for number, loader in enumerate(part.parts):
            ends = self._ends[f"{name}, {number}"] = []
            loader.watch(partial(noting_end, ends=ends))

    def check_streams(self) -> None:
        """See whether streams that were dealt out have been the same in all processes, to the end. A collective.

        It is one for all of an evaluation, if there are such streams that have no limit.

        Raises:
            RuntimeError: if they have ended elsewhere, or with another batch.
        """
        if not self._ends:
            return
        told = self.trainer.strategy.gather_objects(self._ends)  # a collective
        self._ends = {}
        for name in told[0]:
            # Of loaders that are read together, one may not have been read to its end, and one several times.
            ends = [own[name][0] for own in told if own[name]]
            if len(set(ends)) > 1:
                raise different_streams(
                    [batches for batches, _ in ends], name.partition(",")[0]
                )

    def in_order(self, stage: str, outputs: list[list[Any]]) -> list[list[Any]]:
        """The outputs of all processes, by loader, in the order of the loader's batches. A collective."""
        found = self.trainer.strategy.gather_objects(
            map_tensors(outputs, lambda tensor: tensor.detach().cpu())
        )
        found = found[
            :: self.trainer.strategy.tensor_parallel_size
        ]  # the others had the same batches
        merged = []
        for index, by_rank in enumerate(zip(*found, strict=True)):
            if self._parts[stage][index] is None:
                merged.append([output for own in by_rank for output in own])
            else:
                rounds = max(map(len, by_rank))
                merged.append(
                    [own[i] for i in range(rounds) for own in by_rank if i < len(own)]
                )
        return merged

    def close(self) -> None:
        """End the workers of our copies of loaders."""
        if self.train is not None:
            self.train.close()
        for stage in self._iterated:
            self._close(stage)

    def _close(self, stage: str) -> None:
        self._opened.clear()
        for part in self._parts.get(stage, ()):
            if part is not None:
                part.close()
        for ours, given in zip(
            self._iterated.get(stage, ()), self.loaders[stage], strict=False
        ):
            if ours is not given:
                ours.__dict__["_iterator"] = None

    def stale(self, stage: str, every_n_epochs: int) -> bool:
        """Whether the loaders of ``stage`` are to be made again for this epoch."""
        loaded = self.loaded_in_epoch.get(stage)
        return (
            bool(every_n_epochs)
            and loaded is not None
            and self.trainer.state.epoch - loaded >= every_n_epochs
        )

    # -- batches ----------------------------------------------------------------------------------------------

    def transfer(self) -> Callable[[Any, int], Any] | None:
        """A function that takes a batch and its loader's index through the transfer hooks; None if none is needed."""
        names = (
            "on_before_batch_transfer",
            "transfer_batch_to_device",
            "on_after_batch_transfer",
        )
        hooks: list[Any] = []
        overridden = False
        for name in names:
            hook = getattr(self.module, name)
            for owner, base in (
                (self.module, Module),
                (self.datamodule, DataModule),
            ):  # the data's own comes first
                if owner is not None and overrides(owner, name, base):
                    hook, overridden = getattr(owner, name), True
            hooks.append(hook)
        engine = self.trainer.engine
        if not overridden:
            return (
                (lambda batch, _: engine.to_device(batch))
                if engine.moves_batches
                else None
            )
        before, move, after = hooks
        return lambda batch, index: after(
            move(before(batch, index), engine.device, index), index
        )


def _limit_of(stage: str) -> str:
    return f"limit_{'val' if stage == 'validate' else stage}_batches"


def _is_collection(loaders: Any) -> bool:
    return isinstance(loaders, Mapping) or holds_loaders(loaders)


def limited_to(
    length: int | float, told: int | float, limit: int | float, name: str
) -> tuple[int | float, int | float]:
    """How many batches to run under a limit, at most and as the loader tells it.

    Args:
        length: the loader's number of batches; infinite if that is not certain.
        told: as it tells it.
        limit: as of :func:`limited`; a fraction is one of what it tells.
        name: what the limit is called.
    """
    shown = limited(told or length, limit, name)  # a stream that tells 0 does not know
    is_fraction = isinstance(limit, float) and limit < 1.0
    return (shown if is_fraction else limited(length, limit, name)), shown


def limited(length: int | float, limit: int | float, name: str) -> int | float:
    """How many of ``length`` batches to run under a limit: a count, or a fraction from 0.0 to 1.0.

    Raises:
        ValueError: for a fraction of an unknown length, or one so small that nothing would be left.
    """
    if isinstance(limit, int):
        return min(length, limit)
    if limit == 1.0:
        return length
    if length == INFINITE:
        raise ValueError(
            f"{name}={limit}: the loader has no length to take a fraction of; pass a number of batches"
        )
    count = int(length * limit)
    if count == 0 and limit > 0 and length:
        raise ValueError(
            f"{name}={limit} of {length} batches is less than one batch; use at least {1 / length:.4g}"
        )
    return count
