"""Where a run's batches come from: the loaders of each stage, how many batches of them, and how they are moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import chain, count, islice, repeat, zip_longest
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.schema import LoaderState
from ..data.batches import map_tensors
from ..data.combined import (
    CombinedLoader,
    exact_length_of,
    holds_loaders,
    loaders_in,
    source_of,
)
from ..data.device_input import copied_ahead
from ..data.iteration import INFINITE, NO_BATCH, loader_length, may_give_more, up_to
from ..data.position import WHOLE_EPOCH, Segment
from ..data.sampler import NotedIndices, noting_indices, own_copy
from ..data.shard_detection import data_parallel_rank_and_size, is_sharded
from ..data.sharding import (
    ShardedLoader,
    different_streams,
    noting_end,
    require_equal_lengths,
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
# The hooks by which a batch comes to the device.
_MOVES = ("on_before_batch_transfer", "transfer_batch_to_device")


class RunLoaders:
    """The loaders of a run.

    Attributes:
        given: the loaders passed to ``fit``, ``test`` and so on, by stage.
        loaders: by stage, the user's loaders as they are: one object for training, a list for the others.
        train: the training loader as the loop iterates it.
        max_batches: by stage, how many batches to run here at most: a number for training, a list for the others.
            Infinite where a loader is read to its end.
        num_batches: the same, with what loaders tell where that is not certain.
        whole_epoch: batches of a full training epoch at most; an epoch resumed on other ranks may be shorter.
        looks_ahead: whether the number of training batches is not certain, so that their end has to be looked for.
        others_have_ended: whether the running evaluation step is one that other ranks have no batch for.
        batch_indices: indices in the dataset of the samples of the batch that is predicted, if they are known.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: Module,
        datamodule: DataModule | None,
        given: dict[str, Any],
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.datamodule = datamodule
        self.given = given
        self.loaders: dict[str, Any] = {}
        self.max_batches: dict[str, Any] = {}
        self.num_batches: dict[str, Any] = {}
        self.whole_epoch = INFINITE
        self.looks_ahead = False
        self.train: ShardedLoader | None = None
        self.others_have_ended = False
        self.batch_indices: list[Any] | None = None
        # Both by stage.
        self._evaluation: dict[str, list[EvaluationLoader]] = {}
        self._loaded_in_epoch: dict[str, int] = {}
        # The epoch whose training batches were iterated last.
        self._begun_epoch: int | None = None
        # Stages of which the log has said that a loader gives more batches than its length tells.
        self._noted_stages: set[str] = set()

    def has(self, stage: str) -> bool:
        """Whether there is a loader for ``stage``, as far as is known before it is made."""
        every = self.trainer.reload_dataloaders_every_n_epochs
        is_empty = self.loaders.get(stage) == [] and not self.is_stale(stage, every)
        return self._source(stage) is not None and not is_empty

    def _source(self, stage: str) -> Callable[[], Any] | None:
        """What gives the loaders of a stage."""
        given = self.given.get(stage)
        if given is not None:
            return lambda: given
        return self._overridden(LOADER_METHODS[stage])

    def _overridden(self, name: str) -> Callable[..., Any] | None:
        """The data module's method, or else the module's, if one of them overrides it."""
        for owner, base in ((self.datamodule, DataModule), (self.module, Module)):
            if owner is not None and overrides(owner, name, base):
                return getattr(owner, name)
        return None

    def is_stale(self, stage: str, every_n_epochs: int) -> bool:
        """Whether the loaders of ``stage`` are to be made again for this epoch."""
        loaded = self._loaded_in_epoch.get(stage)
        if not every_n_epochs or loaded is None:
            return False
        return self.trainer.state.epoch - loaded >= every_n_epochs

    def close(self) -> None:
        """End the workers of our copies of loaders."""
        if self.train is not None:
            self.train.close()
        for loader in chain.from_iterable(self._evaluation.values()):
            loader.close()

    # Training.

    def load_train(self, again: bool = False) -> None:
        """Make the training loader, once.

        Raises:
            ValueError: if it is empty, or the limit does not go with it.
        """
        if self.train is not None and not again:
            return
        trainer = self.trainer
        state = trainer.state
        if trainer.limit_train_batches == 0:
            self.max_batches["train"] = 0
            self.num_batches["train"] = 0
            return
        source = self._source("train")
        # A fit has been checked for it. But a callback can ask any run for its training batches.
        if source is None:
            raise RuntimeError(
                "there is no training loader whose batches could be counted"
            )
        loaders = self.loaders["train"] = source()
        self._loaded_in_epoch["train"] = state.epoch
        self._begun_epoch = None
        if _is_collection(loaders):
            loaders = CombinedLoader(loaders, "max_size_cycle")
        self.train = ShardedLoader(
            loaders,
            trainer.strategy,
            state.draw_seed(),
            shuffle=not trainer.overfit_batches,
            use_distributed_sampler=trainer.use_distributed_sampler,
            name="training loader",
            epoch=state.epoch + state.epoch_done,
            cursor=trainer.run.resume.cursor,
        )
        self.begin_epoch()
        if self.train.length == 0:
            raise ValueError(
                "the training loader is empty (its length is 0): check its dataset, and batch_size with drop_last=True"
            )

    def begin_epoch(self) -> None:
        """Count the batches of the running epoch."""
        train = self.train
        if train is None:
            return
        state = self.trainer.state
        train.begin_epoch(state.epoch, Segment.from_state(state.part))
        self.looks_ahead = not train.is_length_certain
        exact = INFINITE if self.looks_ahead else train.length
        limit = self.trainer.limit_train_batches
        self.whole_epoch, reported = limited_to(
            exact, train.reported_length, limit, "limit_train_batches"
        )
        self.max_batches["train"] = self.whole_epoch
        self.num_batches["train"] = reported
        if train.segment != WHOLE_EPOCH:
            length = self.max_batches["train"] = train.epoch_length
            if length < INFINITE:
                self.num_batches["train"] = length

    def iterate_train(self) -> Iterator[Any]:
        """Iterate the running epoch from the batch on at which the run is."""
        assert self.train is not None
        state = self.trainer.state
        self._begun_epoch = state.epoch
        batches = self.train.iterate(state.batch_idx)
        if not self.looks_ahead:
            return batches
        reported = self.train.reported_length
        return self._noting_more(batches, reported - state.batch_idx, "train", reported)

    def leave_out(self, batches: Iterable[tuple[int, int]]) -> None:
        """Do not train on these batches, each given by its epoch and its index: from the next time on they are read."""
        assert self.train is not None
        places = [self.train.place_of(*batch) for batch in batches]
        self.trainer.state.leave_out(places)

    def left_out(self) -> set[int]:
        """The indices of the running epoch's batches that are not trained on."""
        data = self.trainer.state.left_out
        if not data:
            return set()
        assert self.train is not None
        return set(chain.from_iterable(map(self.train.steps_with, data)))

    def train_state(self, batch_idx: int) -> LoaderState | None:
        """The training loader's position after ``batch_idx`` batches of the running epoch; None if there is none."""
        if self.train is None:
            return None
        state = self.trainer.state
        is_done = state.batches_done or self._begun_epoch != state.epoch
        most = self.max_batches["train"]
        limit = most if most < self.train.length else None
        return self.train.state_dict(batch_idx, is_done, limit)

    def restore_train(self, resumed: dict[str, Any]) -> None:
        """Go on as the ranks of a checkpoint would, inside an epoch or with the next one.

        Raises:
            CheckpointError: if what they have left of an epoch cannot be sharded over these ranks.
        """
        state = self.trainer.state
        train = self.train
        assert train is not None
        saved = resumed["loader"]
        cursor = saved["cursor"]
        if state.batch_idx and cursor is not None and not state.batches_done:
            train.source.require_resumable()
        position: Any = {
            **saved,
            "epoch": state.epoch,
            "batches": state.batch_idx,
            "part": state.part,
        }
        train.load_state_dict(position, resumed["saved_by"])
        part = train.segment.state_dict()
        if part == state.part:
            return
        state.use_part(part)
        self.begin_epoch()
        log.info(
            "Resuming inside epoch %d: what is left of it for %d process(es), which %d began, is %s batches each",
            state.epoch,
            self.trainer.world_size,
            resumed["saved_by"],
            self.max_batches["train"] - state.batch_idx,
        )

    def _noting_more(
        self,
        batches: Iterator[Any],
        left: float,
        stage: str,
        reported: float,
    ) -> Iterator[Any]:
        """Give the same batches; the log says once if there are more of them than the loader's length tells."""
        if left == INFINITE or not reported or stage in self._noted_stages:
            return batches
        beyond = self._noting_first(batches, stage, reported)
        return chain(islice(batches, max(0, int(left))), beyond)

    def _noting_first(
        self, batches: Iterator[Any], stage: str, reported: float
    ) -> Iterator[Any]:
        """Give the same batches; the log says that the first of them is beyond the loader's length."""
        for batch in batches:
            if stage not in self._noted_stages:
                self._noted_stages.add(stage)
                log.info(
                    "A loader (%s) gives more than the %d batches that its length tells; it is read to its end. To "
                    "end there, set %s=%d",
                    stage,
                    reported,
                    limit_name(stage),
                    reported,
                )
            yield batch

    # Evaluation.

    def load(
        self,
        stage: str,
        limit: float,
        again: bool = False,
    ) -> bool:
        """Make the loaders of ``"validate"``, ``"test"`` or ``"predict"``, once; False if there are none to run."""
        if limit == 0:
            self.max_batches.setdefault(stage, [])
            self.num_batches.setdefault(stage, [])
            return False
        if stage not in self.loaders or again:
            self._make(stage)
        loaders = self._evaluation[stage]
        lengths = [loader.limit_to(limit, limit_name(stage)) for loader in loaders]
        by_rank = self.trainer.strategy.gather_objects(lengths)  # collective
        for number, loader in enumerate(loaders):
            loader.compare([counts[number] for counts in by_rank])
        self.max_batches[stage] = [loader.max_batches for loader in loaders]
        self.num_batches[stage] = [loader.reported_batches for loader in loaders]
        return bool(loaders)

    def _make(self, stage: str) -> None:
        """Make the loaders of an evaluation; an empty list if neither the user nor a hook gives any."""
        source = self._source(stage)
        given = None if source is None else source()
        loaders = [given]
        if given is None or (isinstance(given, (list, tuple)) and not given):
            loaders = []
        elif isinstance(given, CombinedLoader) and given.mode == "sequential":
            loaders = list(given.flattened)
        elif _is_collection(given):
            loaders = loaders_in(given)
        self.loaders[stage] = loaders
        self._loaded_in_epoch[stage] = self.trainer.state.epoch
        for before in self._evaluation.get(stage, ()):
            before.close()
        counts = self.trainer.strategy.gather_objects(len(loaders))  # collective
        if len(set(counts)) > 1:
            raise ValueError(
                f"the processes have different numbers of {stage} loaders, by rank: {counts}"
            )
        self._evaluation[stage] = [
            EvaluationLoader(
                loader, f"{stage} loader {index}", self.trainer, stage == "predict"
            )
            for index, loader in enumerate(loaders)
        ]

    def load_validation(self) -> bool:
        """Make the validation loaders if validation runs in this epoch; False if there is nothing to validate on."""
        trainer = self.trainer
        if not trainer.enable_validation:
            return False
        again = self.is_stale("validate", trainer.reload_dataloaders_every_n_epochs)
        return self.load("validate", trainer.limit_val_batches, again)

    def evaluation_batches(
        self,
        stage: str,
        index: int,
        limit: float,
    ) -> Iterator[tuple[Any, bool]]:
        """At most ``limit`` batches of an evaluation loader, and whether each is a dummy.

        Where the ranks meet in each forward pass, each gets as many batches as the one with most: its own, and then
        dummies.
        """
        loader = self._evaluation[stage][index]
        batches: Iterator[Any] = iter(())
        if limit:
            reported = loader.reported_length
            left = loader.count(reported)
            batches = loader.iterate(limit)
            batches = self._noting_more(batches, left, stage, reported)
        if limit != INFINITE:
            batches = islice(batches, int(limit))
        batches = self.copied_ahead(batches, loader.given, loader)
        pairs: Iterator[tuple[Any, bool]] = zip(batches, repeat(False), strict=False)
        capabilities = self.trainer.strategy.capabilities
        if capabilities.needs_equal_forwards and self.trainer.world_size > 1:
            pairs = loader.with_dummies(batches)
        try:
            for number, pair in enumerate(pairs):
                self.others_have_ended = number >= loader.batches_on_all
                _, is_dummy = pair
                self.batch_indices = None if is_dummy else loader.next_indices()
                yield pair
        finally:
            self.others_have_ended = False
            self.batch_indices = None

    def check_streams(self) -> None:
        """See whether streams that were sharded have been the same on all ranks, to the end.

        A single collective for all loaders of an evaluation; none if no such stream was read without a limit.

        Raises:
            RuntimeError: if they have ended elsewhere, or with another batch.
        """
        ends: dict[str, list[tuple[int, str]]] = {}
        for loader in chain.from_iterable(self._evaluation.values()):
            ends.update(loader.ends)
            loader.ends = {}
        if not ends:
            return
        by_rank = self.trainer.strategy.gather_objects(ends)  # collective
        for name in ends:
            # Of loaders that are read together, one may not have been read to its end, and one several times.
            first_ends = [of_rank[name][0] for of_rank in by_rank if of_rank[name]]
            if len(set(first_ends)) > 1:
                batches = [number for number, _ in first_ends]
                raise different_streams(batches, name.partition(",")[0])

    def in_order(self, stage: str, outputs: list[list[Any]]) -> list[list[Any]]:
        """The outputs of all ranks, by loader, in the order of the loader's batches. A collective."""
        strategy = self.trainer.strategy
        on_cpu = map_tensors(outputs, lambda tensor: tensor.detach().cpu())
        by_rank = strategy.gather_objects(on_cpu)  # collective
        # The other ranks of a tensor-parallel group had the same batches.
        by_rank = by_rank[:: strategy.tensor_parallel_size]
        merged = []
        for number, loader in enumerate(self._evaluation[stage]):
            of_loader = [outputs[number] for outputs in by_rank]
            if loader.source is None:
                in_order = chain.from_iterable(of_loader)
            else:
                in_turn = zip_longest(*of_loader, fillvalue=NO_BATCH)
                in_order = chain.from_iterable(in_turn)
            merged.append([output for output in in_order if output is not NO_BATCH])
        return merged

    def reload(self) -> None:
        """Make those loaders again that have been made, as with another batch size. All ranks call this."""
        for stage in [*self.loaders]:
            if stage == "train":
                self.load_train(again=True)
            else:
                limits = self.max_batches[stage]
                self.load(stage, getattr(self.trainer, limit_name(stage)), again=True)
                # An evaluation that has begun has been given this list.
                limits[:] = self.max_batches[stage]

    # Moving batches.

    def copied_ahead(
        self, batches: Iterator[Any], loader: Any, weights: Any
    ) -> Iterator[Any]:
        """As :func:`.device_input.copied_ahead`, unless a hook of the user's has a part in it."""
        if any(map(self._overridden, _MOVES)):
            return batches
        return copied_ahead(batches, loader, weights, self.trainer.engine.device)

    def transfer(self, is_moved: bool = False) -> Callable[[Any, int], Any] | None:
        """A function that takes a batch and its loader's index through the transfer hooks; None if none is needed.

        Args:
            is_moved: whether the batch is on the device already.
        """
        names = (*_MOVES, "on_after_batch_transfer")
        engine = self.trainer.engine
        hooks = [self._overridden(name) for name in names]
        if not any(hooks):
            if not engine.moves_batches:
                return None
            to_device = engine.convert if is_moved else engine.to_device
            return lambda batch, _: to_device(batch)
        before, move, after = (
            hook or getattr(self.module, name)
            for hook, name in zip(hooks, names, strict=True)
        )
        return lambda batch, index: after(
            move(before(batch, index), engine.device, index), index
        )


class EvaluationLoader:
    """A loader of an evaluation, as one rank reads it: all of it, or a shard of its batches.

    Args:
        loader: the user's loader.
        name: what to call it in messages.
        trainer: has the ranks, and the seed.
        notes_indices: note of which samples each batch is made.

    Attributes:
        given: the loader, as the user gave it.
        batch_weight: what a batch counts; all count alike.
        source: what gives the batches where it is not the loader itself.
        max_batches: how many batches this rank runs at most.
        reported_batches: the same, with what the loader tells where that is not certain.
        batches_on_all: how many batches every rank is sure to have.
        ends: how the sharded streams have ended, by name: numbers of batches and hashes of the last ones.
    """

    def __init__(
        self,
        loader: Any,
        name: str,
        trainer: Trainer,
        notes_indices: bool = False,
    ) -> None:
        self.given = loader
        self.batch_weight = 1.0
        self._name = name
        self._strategy = trainer.strategy
        self._rank, self._world_size = data_parallel_rank_and_size(trainer.strategy)
        # With workers of its own, which the run can end without ending those of the user's loader.
        if isinstance(loader, CombinedLoader):
            loader = loader.for_runs()
        self._copy = own_copy(loader)
        self.source: BatchSource | None
        self._begun: Iterator[Any] | None = None
        self._compares_ends = False
        self._noted_indices: NotedIndices | None = None
        if trainer.world_size == 1:
            self.source = kept_iterator_source(loader)
        else:
            requested = trainer.use_distributed_sampler
            self.source = source_of(loader, trainer.state.draw_seed())
            if notes_indices:
                self._noted_indices = self.source.note_indices()
            self._compares_ends = requested is None
            if is_sharded(
                self.source, trainer.strategy, requested, 0, name, mixed=False
            ):
                # The source was begun to find that out, and what it has read is not to be lost.
                self._begun = self.source.begun_iteration()
                self.source = None
        if notes_indices and self.source is None and self._begun is None:
            self._copy, self._noted_indices = noting_indices(loader)
        self._noted: set[Any] = set()
        self.ends: dict[str, list[tuple[int, str]]] = {}
        self.max_batches = INFINITE
        self.reported_batches = INFINITE
        self.batches_on_all = INFINITE
        self._batches_on_any = INFINITE

    @property
    def reported_length(self) -> float:
        """Number of the loader's batches, as its length tells it."""
        return loader_length(self.given)

    def count(self, batches: float) -> float:
        """How many of the loader's batches this rank has."""
        if self.source is None or batches == INFINITE:
            return batches
        return len(range(self._rank, int(batches), self._world_size))

    def limit_to(self, limit: float, name: str) -> tuple[float, float]:
        """Set how many batches to run, under a limit that is called ``name``.

        Returns:
            The loader's length, and how many batches this rank has of it; infinite where that is not certain.

        Raises:
            ValueError: if the loader is empty, or the limit does not go with it.
        """
        is_single = self._world_size == 1
        exact = exact_length_of(self.given, trusts_samplers=not is_single)
        # A rank's own part of the data may be empty.
        if exact == 0 and (is_single or self.source is not None):
            raise ValueError(
                f"{self._name} is empty (its length is 0): check its dataset"
            )
        most, reported = limited_to(exact, self.reported_length, limit, name)
        self.max_batches = self.count(most)
        self.reported_batches = self.count(reported)
        return exact, self.max_batches if exact < INFINITE else INFINITE

    def compare(self, by_rank: list[tuple[float, float]]) -> None:
        """Take what :meth:`limit_to` returned on all ranks.

        Raises:
            ValueError: if the loader is to be sharded, and has different lengths.
        """
        if self.source is not None:
            require_equal_lengths([exact for exact, _ in by_rank], self._name)
        counts = [batches for _, batches in by_rank]
        self._batches_on_any = max(counts)
        self.batches_on_all = min(counts)
        if len(counts) == 1:
            self.batches_on_all = INFINITE
        elif INFINITE in counts:
            # Where nobody knows, there is none that each rank is sure to have.
            self.batches_on_all = 0

    def iterate(self, limit: float) -> Iterator[Any]:
        """Iterate this rank's batches, of which at most ``limit`` will be read."""
        # Workers that persist take their seeds when they start, in the first evaluation of a process, be it a resumed
        # one: that must not take a number from the training's generator.
        is_isolated = getattr(self._copy, "persistent_workers", False)
        with isolated_rng() if is_isolated else nullcontext():
            if self.source is not None:
                if limit == INFINITE and self._compares_ends:
                    self._watch(self.source)
                return self.source.iterate(0, self._rank, self._world_size)
            batches = self._begun
            self._begun = None
            if batches is None:
                batches = iterate_protected(self._copy)
        if may_give_more(self._copy):
            is_single = self._world_size == 1
            exact = exact_length_of(self._copy, trusts_samplers=not is_single)
            if 0 < exact < INFINITE:
                length = int(exact)
                return up_to(self._copy, batches, length, length, self._noted)
        return batches

    def next_indices(self) -> list[Any] | None:
        """The indices in the dataset of the samples of the batch that comes next; None if they are not known."""
        noted = self._noted_indices
        return noted.given.popleft() if noted is not None and noted.given else None

    def with_dummies(self, batches: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        """Each batch and False; then, for each that other ranks still have, a dummy and True."""
        last = NO_BATCH
        rounds = self._batches_on_any
        for _ in count() if rounds == INFINITE else range(int(rounds)):
            batch = next(batches, NO_BATCH)
            if rounds == INFINITE:
                has_batch = torch.tensor(int(batch is not NO_BATCH))
                # Nobody knows how many there are, so the ranks meet for each batch.
                if not self._strategy.reduce(has_batch, "max"):  # collective
                    return
            is_dummy = batch is NO_BATCH
            if not is_dummy:
                last = batch
            elif last is NO_BATCH:
                last = self._borrow()
            yield last, is_dummy

    def _borrow(self) -> Any:
        """A batch of another rank, for one that has none."""
        if self.source is not None:
            with isolated_rng():
                batch = next(self.source.iterate(0), NO_BATCH)
            if batch is not NO_BATCH:
                return batch
        raise RuntimeError(
            f"rank {self._strategy.global_rank} has no batch in {self._name}, and strategy={self._strategy.name!r} "
            "needs one in each process, as they meet in each forward pass"
        )

    def _watch(self, source: BatchSource) -> None:
        """Note where each stream of a source ends, for :meth:`RunLoaders.check_streams`."""
        for number, part in enumerate(source.parts):
            ends = self.ends[f"{self._name}, {number}"] = []
            part.watch(partial(noting_end, ends=ends))

    def close(self) -> None:
        """End the workers of our copies of the loader."""
        self._begun = None
        if self.source is not None:
            self.source.close()
        if self._copy is not self.given:
            self._copy.__dict__["_iterator"] = None


def limit_name(stage: str) -> str:
    """The Trainer's argument that limits the batches of a stage."""
    return f"limit_{'val' if stage == 'validate' else stage}_batches"


def _is_collection(loaders: Any) -> bool:
    """Whether this is several loaders, to be read together in training and one after the other in evaluations."""
    return isinstance(loaders, Mapping) or holds_loaders(loaders)


def limited_to(
    length: float,
    reported: float,
    limit: float,
    name: str,
) -> tuple[float, float]:
    """How many batches to run under a limit: at most, and to report before the end is known.

    Args:
        length: the loader's number of batches; infinite if that is not certain.
        reported: the same, as the loader tells it.
        limit: as of :func:`limited`; a fraction is one of the reported number.
        name: what the limit is called.
    """
    # A stream whose length tells 0 does not know it.
    shown = limited(reported or length, limit, name)
    is_fraction = isinstance(limit, float) and limit < 1.0
    return (shown if is_fraction else limited(length, limit, name)), shown


def limited(
    length: float,
    limit: float,
    name: str,
) -> float:
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
