"""Accelerate's prepared loaders: torch's own DataLoader, whose sampler gives this process's batches.

They differ from the Engine's on purpose. The order is the sampler's, drawn from torch's generator; the last round is
filled up with samples from the beginning; and ``load_state`` does not move them, as scripts skip batches by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from ...checkpoint.schema import LoaderState
from ...data.device_input import move_batch
from ...data.sampler import fresh_copy
from ...engine.wrapper import Wrapper
from .operations import (
    concatenate,
    concatenate_tensors,
    find_batch_size,
    slice_tensors,
)
from .random import synchronize_rng_states
from .samplers import (
    BatchSamplerShard,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipBatchSampler,
)
from .state import GradientState, PartialState

if TYPE_CHECKING:
    from .accelerator import Accelerator


class DataLoaderShard(Wrapper, DataLoader):
    """A loader that gives this process's batches, on its device, and knows which one is the last.

    It has all attributes of the DataLoader that it reads.

    Args:
        dataset: a DataLoader with this process's batches; or a dataset, of which one is made.
        device: where its batches are moved; None leaves them.
        rng_types: the generators that are made equal in all processes before each iteration.
        synchronized_generator: that of the sampler, for ``"generator"`` among them.
        skip_batches: how many to leave out at the beginning, though they are loaded.
        non_blocking: do not wait for batches to reach the device.
        use_stateful_dataloader: keep the position, by torchdata's loader.
        **options: of the DataLoader that is made.

    Attributes:
        engine: the Accelerator that has prepared it, if one has.
        end_of_dataloader: whether the running batch is the last.
        remainder: how many samples of the last round are no repetitions, 0 for all of them; -1 if that is not known.
        iteration: how often it has been read to its end.
        batches: number of batches given in this iteration.
        batch: the running batch.
        batch_weight: 1.0: all batches count alike.
    """

    _wraps = "base_dataloader"
    _is_accelerate_prepared = True
    batch_weight = 1.0

    def __init__(
        self,
        dataset: Any,
        device: torch.device | None = None,
        rng_types: list[Any] | None = None,
        synchronized_generator: torch.Generator | None = None,
        skip_batches: int = 0,
        non_blocking: bool = False,
        use_stateful_dataloader: bool = False,
        **options: Any,
    ) -> None:
        self.base_dataloader = _loader_of(dataset, use_stateful_dataloader, options)
        self.use_stateful_dataloader = use_stateful_dataloader
        self.device: torch.device | None = device
        self.rng_types = rng_types
        self.synchronized_generator = synchronized_generator
        self.skip_batches = skip_batches
        self.non_blocking = non_blocking
        self.gradient_state = GradientState()
        self.engine: Accelerator | None = None
        self.end_of_dataloader = False
        self.remainder = -1
        self.iteration = 0
        self.batches = 0
        self.batch: Any = None
        # The loader's own state after the running batch, if it keeps one: it is read one batch ahead.
        self._state: Any = None

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride] # nobody sets it
        """The loader's class, which ``isinstance`` asks for beside the one of this object."""
        base = self.__dict__.get("base_dataloader")
        return type(self) if base is None else type(base)

    def __reduce__(self) -> Any:
        # Python would make one of the loader's class. What all loaders share, is not of this one.
        state = {
            name: own for name, own in vars(self).items() if name != "gradient_state"
        }
        return _blank, (type(self),), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.gradient_state = GradientState()

    def belong_to(self, engine: Accelerator) -> None:
        """Tell an Accelerator, from now on, when it is iterated."""
        self.engine = engine

    @property
    def loader(self) -> Any:
        """The DataLoader that is read."""
        return self.base_dataloader

    @property
    def keeps_position(self) -> bool:
        """Whether a checkpoint holds the position."""
        return callable(getattr(self.base_dataloader, "state_dict", None))

    @property
    def stateful(self) -> bool:
        """Whether processes have positions of their own."""
        return self.keeps_position

    @property
    def epoch(self) -> int:
        """:attr:`iteration`, as the Engine calls it."""
        return self.iteration

    @property
    def length(self) -> float:
        """Number of batches; infinite if that is not known."""
        with suppress(TypeError):
            return len(self)
        return float("inf")

    @property
    def total_batch_size(self) -> int:
        """Samples of one round of all processes."""
        if isinstance(self.dataset, IterableDatasetShard):
            return self.dataset.round_size
        sampler: Any = self.sampler
        sampler = sampler if isinstance(sampler, BatchSampler) else self.batch_sampler
        if getattr(sampler, "split_batches", False):
            return sampler.batch_size
        return sampler.batch_size * getattr(sampler, "num_processes", 1)

    @property
    def total_dataset_length(self) -> int:
        """Samples of the dataset."""
        return self._length_of_dataset()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the loader's sampler or dataset, if it has one."""
        self.iteration = epoch
        sampler: Any = self.batch_sampler
        followers: list[Any] = [self.sampler, self.dataset]
        while sampler is not None:
            followers.append(sampler)
            inner = getattr(sampler, "batch_sampler", None)
            sampler = inner or getattr(sampler, "sampler", None)
        for follower in followers:
            if hasattr(follower, "set_epoch"):
                follower.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.base_dataloader) - self.skip_batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override] # it is no iterator of torch's
        self._begin()
        try:
            for batch in self._read():
                self.batches += 1
                self.batch = batch
                yield batch
            self.iteration += 1
        finally:
            self._end()

    def _begin(self) -> None:
        if self.rng_types is not None:
            synchronize_rng_states(self.rng_types, self.synchronized_generator)
        self.end_of_dataloader = False
        self.batches = 0
        self.remainder = self._remainder()
        self.gradient_state.enter(self)
        if self.engine is not None:
            self.engine.enter_loader(self)  # type: ignore[arg-type] # it has a prepared loader's interface
        self.set_epoch(self.iteration)

    def _end(self) -> None:
        self.batch = None
        self.gradient_state.leave(self)
        if self.engine is not None:
            self.engine.leave_loader(self)  # type: ignore[arg-type] # it has a prepared loader's interface

    def _remainder(self) -> int:
        """How many samples of the last round are no repetitions, if that is known."""
        sampler = self.batch_sampler
        if getattr(self.base_dataloader, "drop_last", False):
            return -1
        if not getattr(sampler, "even_batches", True):
            return 0
        with suppress(TypeError, AttributeError):
            return self._num_samples() % self.total_batch_size
        return -1

    def _num_samples(self) -> int:
        """Samples of all processes: those of the innermost sampler, which may leave out a part of the dataset."""
        sampler: Any = self.batch_sampler
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        # With a dataset that is iterated, the sampler gives no end of None.
        inner = getattr(sampler, "sampler", None)
        if inner is None or isinstance(self.dataset, IterableDataset):
            return self._length_of_dataset()
        return len(inner)

    def _length_of_dataset(self) -> int:
        dataset: Any = self.dataset
        if isinstance(dataset, IterableDatasetShard):
            dataset = dataset.dataset
        return len(dataset)

    def _read(self) -> Iterator[Any]:
        """The batches on the device, read one ahead to know the last one."""
        batches = islice(self.base_dataloader, self.skip_batches, None)
        batch = next(batches, _NOTHING)
        while batch is not _NOTHING:
            if self.device is not None:
                batch = move_batch(batch, self.device)
            self._state = self._own_state()
            following = next(batches, _NOTHING)
            self.end_of_dataloader = following is _NOTHING
            if self.end_of_dataloader:
                self._state = self._own_state()
            yield batch
            batch = following

    def _own_state(self) -> Any:
        return self.base_dataloader.state_dict() if self.keeps_position else None

    def state_dict(self) -> dict[str, Any]:
        """The position after the running batch, as torchdata's loader tells it, if the loader keeps one.

        Raises:
            AttributeError: if it does not.
        """
        if not self.keeps_position:
            raise AttributeError(
                "this loader keeps no position: DataLoaderConfiguration(use_stateful_dataloader=True) makes it do so"
            )
        return self._own_state() if self._state is None else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there when iterated next."""
        self._state = state_dict
        self.base_dataloader.load_state_dict(copy.deepcopy(state_dict))

    def read_in_order_of(self, seed: int) -> None:
        """Nothing: the order is the sampler's."""

    def close(self) -> None:
        """Nothing: the workers are the DataLoader's."""


def _blank(kind: type[DataLoaderShard]) -> DataLoaderShard:
    return object.__new__(kind)


class PositionOf:
    """A loader's position, as checkpoints hold it.

    Args:
        loader: keeps its position.

    Attributes:
        stateful: whether processes have positions of their own.
    """

    def __init__(self, loader: DataLoaderShard) -> None:
        self.loader = loader
        self.stateful = loader.stateful

    def state_dict(self) -> LoaderState:
        """The position, and how often the loader has been read to its end."""
        return {
            "epoch": self.loader.iteration,
            "batches": self.loader.batches,
            "loader": self.loader.state_dict(),
            "part": None,
            "cursor": None,
        }

    def load_state_dict(self, state: LoaderState, saved_by: int | None = None) -> None:
        """Go on from there when iterated next; ``saved_by`` tells how many processes have saved it."""
        self.loader.iteration = state["epoch"]
        self.loader.load_state_dict(state["loader"])


_NOTHING = object()


def _loader_of(given: Any, keeps_position: bool, options: dict[str, Any]) -> Any:
    """A DataLoader as it was given, or one of a dataset."""
    is_loader = isinstance(given, DataLoader) or hasattr(given, "batch_sampler")
    if is_loader and not options:
        return _as_stateful(given) if keeps_position else given
    kind: Any = _stateful_class() if keeps_position else DataLoader
    return kind(given, **options)


class _Apart:
    """The batches of one round that cannot be joined to one, as they hold texts, or tensors of different shapes."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches


def _joined(batches: list[Any]) -> Any:
    """The batches of one round as one, whose rows the processes divide; if that cannot be, each gets one of them."""
    try:
        joined = concatenate_tensors(batches)
        find_batch_size(joined)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return _Apart(batches)
    return joined


class DataLoaderDispatcher(DataLoaderShard):
    """A loader that only the main process reads; the others get their parts of its batches from there.

    Args:
        dataset: the loader, with the batches of all processes; or a dataset, of which one is made.
        split_batches: divide each batch; otherwise as many are read at once as there are processes.
        slice_fn: takes a batch, a slice, and the index and number of processes, and gives a part of the batch.
        **kwargs: as of :class:`DataLoaderShard`.
    """

    def __init__(
        self,
        dataset: Any,
        split_batches: bool = False,
        slice_fn: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, **kwargs)
        self.split_batches = split_batches
        self.slice_fn = slice_fn or slice_tensors

    @property
    def total_batch_size(self) -> int:
        """Samples of one round of all processes."""
        size = self.base_dataloader.batch_size
        return size if self.split_batches else size * PartialState().num_processes

    def __len__(self) -> int:
        batches = len(self.base_dataloader)
        count = PartialState().num_processes
        if not self.split_batches:
            batches, rest = divmod(batches, count)
            batches += rest > 0 and not self.base_dataloader.drop_last
        return batches - self.skip_batches

    def _rounds(self) -> Iterator[tuple[Any, bool, Any]]:
        """In the main process: the batches of all processes together, whether they are the last, and the state then."""
        count = 1 if self.split_batches else PartialState().num_processes
        batches = iter(self.base_dataloader)
        given = list(islice(batches, count))
        while given:
            # Before more is read, the loader's own state is that after these.
            state = self._own_state()
            following = list(islice(batches, count))
            is_short = len(given) < count and self.base_dataloader.drop_last
            if not is_short:
                yield _joined(given), not following, state
            given = following

    def _read(self) -> Iterator[Any]:
        state = PartialState()
        rounds = self._rounds() if state.process_index == 0 else iter(())
        first: Any = None
        skipped = 0
        while True:
            content = next(rounds, (None, True, None))
            whole, is_last, self._state = state.engine.broadcast(content)
            if whole is None:
                return
            first = whole if first is None else first
            if isinstance(whole, _Apart):
                part = self._turn(whole, first, state)
            else:
                part = self._part(whole, first, state)
            self.end_of_dataloader = is_last
            if skipped >= self.skip_batches:
                yield part
            skipped += 1
            if is_last:
                return

    def _turn(self, whole: _Apart, first: Any, state: PartialState) -> Any:
        """The batch of a round whose turn it is: those of a process without one are the first ones again."""
        batches = whole.batches
        if len(batches) < state.num_processes and isinstance(first, _Apart):
            batches = [*batches, *first.batches, *batches * state.num_processes]
        # Nobody can tell how many samples a batch without tensors has.
        self.remainder = 0 if len(whole.batches) == state.num_processes else -1
        batch = batches[state.process_index % len(batches)]
        return batch if self.device is None else move_batch(batch, self.device)

    def _part(self, whole: Any, first: Any, state: PartialState) -> Any:
        if self.device is not None:
            whole = move_batch(whole, self.device)
        count = state.num_processes
        size = find_batch_size(whole) or 0
        share = -(-size // count)
        self.remainder = size % count and size
        missing = share * count - size
        if isinstance(first, _Apart):
            first = whole
        if missing:
            while (find_batch_size(first) or 0) < missing:
                first = concatenate([first, first])
            fill = slice_tensors(first, slice(0, missing))
            device = self.device or torch.device("cpu")
            whole = concatenate([whole, move_batch(fill, device)])
        begin = share * state.process_index
        part = slice(begin, begin + share)
        return self.slice_fn(
            whole, part, process_index=state.process_index, num_processes=count
        )


def prepare_data_loader(
    dataloader: DataLoader[Any],
    device: torch.device | None = None,
    num_processes: int | None = None,
    process_index: int | None = None,
    split_batches: bool = False,
    put_on_device: bool = False,
    rng_types: list[Any] | None = None,
    dispatch_batches: bool | None = None,
    even_batches: bool = True,
    slice_fn_for_dispatch: Callable[..., Any] | None = None,
    use_seedable_sampler: bool = False,
    data_seed: int | None = None,
    non_blocking: bool = False,
    use_stateful_dataloader: bool = False,
    torch_device_mesh: Any = None,
) -> DataLoaderShard:
    """A loader of this process's batches.

    Args:
        dataloader: that of all processes.
        device: where batches are moved, with ``put_on_device``.
        num_processes: how many there are (default: as the processes are).
        process_index: which one this is.
        split_batches: this, and what follows it, as of :class:`~.options.DataLoaderConfiguration`.
        put_on_device: move the batches.
        rng_types: the generators that are made equal in all processes before each iteration.
        dispatch_batches: read in the main process.
        even_batches: fill up the last round.
        slice_fn_for_dispatch: takes this process's part of a batch, with ``dispatch_batches``.
        use_seedable_sampler: draw the order from a seed.
        data_seed: that seed.
        non_blocking: do not wait for batches to reach the device.
        use_stateful_dataloader: keep the position.
        torch_device_mesh: must be None, as loaders here give each process batches of its own.

    Raises:
        ValueError: for arguments that do not go together.
        ImportError: for ``use_stateful_dataloader`` without torchdata.
    """
    if torch_device_mesh is not None:
        raise ValueError(
            "torch_device_mesh: a loader gives each process batches of its own; leave it out"
        )
    if dispatch_batches is None:
        dispatch_batches = put_on_device and _is_stream(dataloader)
    if dispatch_batches and not put_on_device:
        raise ValueError("Using `dispatch_batches=True` requires `put_on_device=True`.")
    state = PartialState()
    count = state.num_processes if num_processes is None else num_processes
    index = state.process_index if process_index is None else process_index
    changes: dict[str, Any] = {}
    generator = _generator_of(dataloader)
    if use_seedable_sampler:
        changes, generator = _with_seedable_sampler(dataloader, data_seed)
    if count > 1 and not dispatch_batches:
        if _is_stream(dataloader):
            changes |= _stream_shard(dataloader, count, index, split_batches)
        else:
            generator = _share_generator(dataloader, changes, generator)
            _shard(dataloader, changes, count, index, split_batches, even_batches)
    base: Any = fresh_copy(dataloader, **changes)
    options: dict[str, Any] = {
        "dataset": base,
        "use_stateful_dataloader": use_stateful_dataloader,
        "device": device if put_on_device else None,
        "rng_types": rng_types,
        "synchronized_generator": generator,
        "non_blocking": non_blocking,
    }
    if not dispatch_batches:
        return DataLoaderShard(**options)
    return DataLoaderDispatcher(
        split_batches=split_batches, slice_fn=slice_fn_for_dispatch, **options
    )


def _where_sampler_is(dataloader: DataLoader[Any]) -> str:
    """The attribute that gives a loader the indices of each batch."""
    is_own = isinstance(dataloader.sampler, BatchSampler)
    return "sampler" if is_own else "batch_sampler"


def _sampler_of(dataloader: DataLoader[Any]) -> Any:
    """The sampler that gives single indices; None if there is none."""
    return getattr(getattr(dataloader, _where_sampler_is(dataloader)), "sampler", None)


def _generator_of(dataloader: DataLoader[Any]) -> torch.Generator | None:
    return getattr(_sampler_of(dataloader), "generator", None)


def _copy_with(original: Any, **changes: Any) -> Any:
    """A copy of a sampler with other attributes."""
    copied = copy.copy(original)
    vars(copied).update(changes)
    return copied


def _with_sampler(dataloader: DataLoader[Any], sampler: Any) -> dict[str, Any]:
    """What to change in a copy of a loader, to let it have another sampler."""
    place = _where_sampler_is(dataloader)
    batch_sampler = _copy_with(getattr(dataloader, place), sampler=sampler)
    changes = {place: batch_sampler}
    if place == "batch_sampler":
        changes["sampler"] = sampler
    return changes


def _with_seedable_sampler(
    dataloader: DataLoader[Any], data_seed: int | None
) -> tuple[dict[str, Any], torch.Generator | None]:
    """What to change to draw the order from a seed, and the generator that does so, if there is an order to draw."""
    sampler = _sampler_of(dataloader)
    if not isinstance(sampler, RandomSampler):
        return {}, _generator_of(dataloader)
    generator = sampler.generator or torch.Generator()
    seedable = SeedableRandomSampler(
        data_source=sampler.data_source,
        replacement=sampler.replacement,
        num_samples=sampler.num_samples,
        generator=generator,
        data_seed=data_seed,
    )
    return _with_sampler(dataloader, seedable), generator


def _share_generator(
    dataloader: DataLoader[Any],
    changes: dict[str, Any],
    generator: torch.Generator | None,
) -> torch.Generator | None:
    """Let the sampler have a generator, so that it can be made equal in all processes."""
    sampler = _sampler_of(dataloader)
    if changes or not hasattr(sampler, "generator"):
        return generator
    if sampler.generator is None:
        generator = torch.Generator()
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        generator.manual_seed(seed)
        sampler = _copy_with(sampler, generator=generator)
        changes.update(_with_sampler(dataloader, sampler))
    return sampler.generator


def _shard(
    dataloader: DataLoader[Any],
    changes: dict[str, Any],
    count: int,
    index: int,
    split_batches: bool,
    even_batches: bool,
) -> None:
    """Let a copy of a loader have the batches of one of several processes."""
    place = _where_sampler_is(dataloader)
    sampler = changes.get(place, getattr(dataloader, place))
    if sampler is None:
        raise ValueError(
            "a loader with batch_size=None and without a batch sampler cannot be dealt out to the processes; give it "
            "a batch_size, or let each process read its own part and leave the loader out of prepare"
        )
    changes[place] = BatchSamplerShard(
        sampler, count, index, split_batches, even_batches
    )


def _stream_shard(
    dataloader: DataLoader[Any], count: int, index: int, split_batches: bool
) -> dict[str, Any]:
    """What to change to let each process iterate its samples of a dataset."""
    dataset: Any = dataloader.dataset
    # One of the package datasets has files, or such parts, of which each process reads its own.
    is_divided = type(dataset).__module__.partition(".")[0] == "datasets"
    if is_divided and not split_batches and dataset.n_shards >= count:
        return {"dataset": dataset.shard(num_shards=count, index=index)}
    size = dataloader.batch_size or 1
    changes: dict[str, Any] = {
        "dataset": IterableDatasetShard(
            dataloader.dataset,
            batch_size=size,
            drop_last=dataloader.drop_last,
            num_processes=count,
            process_index=index,
            split_batches=split_batches,
        )
    }
    if split_batches and dataloader.batch_size is not None:
        changes["batch_size"] = size // count
        changes["batch_sampler"] = BatchSampler(
            dataloader.sampler, size // count, dataloader.drop_last
        )
    return changes


def _stateful_class() -> Any:
    """Torchdata's loader.

    Raises:
        ImportError: without torchdata.
    """
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise ImportError(
            "StatefulDataLoader is not available. Please install torchdata version 0.8.0 or higher to use it."
        ) from error
    return StatefulDataLoader


def _as_stateful(dataloader: DataLoader[Any]) -> Any:
    """The same loader as torchdata's, which keeps its position.

    Raises:
        ImportError: without torchdata.
    """
    if hasattr(dataloader, "state_dict"):
        return dataloader
    options = {
        name: getattr(dataloader, name)
        for name in (
            "num_workers",
            "collate_fn",
            "pin_memory",
            "timeout",
            "worker_init_fn",
            "multiprocessing_context",
            "generator",
            "prefetch_factor",
            "persistent_workers",
        )
    }
    is_stream = isinstance(dataloader.dataset, IterableDataset)
    if is_stream or dataloader.batch_sampler is None:
        options |= {
            "batch_size": dataloader.batch_size,
            "drop_last": dataloader.drop_last,
            "sampler": None if is_stream else dataloader.sampler,
        }
    else:
        options["batch_sampler"] = dataloader.batch_sampler
    return _stateful_class()(dataloader.dataset, **options)


def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
    """A loader without its first batches, which are not loaded where a sampler tells their indices.

    Args:
        dataloader: prepared, or not.
        num_batches: how many are left out.
    """
    if isinstance(dataloader, DataLoaderShard):
        skipped = copy.copy(dataloader)
        base = dataloader.base_dataloader
        if isinstance(dataloader, DataLoaderDispatcher) or _is_stream(base):
            skipped.skip_batches = dataloader.skip_batches + num_batches
        else:
            skipped.base_dataloader = _without_first(base, num_batches)
        return skipped
    if _is_stream(dataloader):
        return _Skipped(dataloader, num_batches)
    return _without_first(dataloader, num_batches)


def _is_stream(dataloader: Any) -> bool:
    if not isinstance(dataloader, DataLoader):
        return True
    return isinstance(dataloader.dataset, IterableDataset)


def _without_first(dataloader: DataLoader[Any], num_batches: int) -> DataLoader[Any]:
    place = _where_sampler_is(dataloader)
    if getattr(dataloader, place) is None:
        place = "sampler"
    sampler = SkipBatchSampler(getattr(dataloader, place), num_batches)
    return fresh_copy(dataloader, **{place: sampler})


class _Skipped(Wrapper):
    """A stream of batches without its first ones, which are read all the same.

    Args:
        base_dataloader: with them.
        skip_batches: how many are left out.
    """

    _wraps = "base_dataloader"

    def __init__(self, base_dataloader: Any, skip_batches: int = 0) -> None:
        self.base_dataloader = base_dataloader
        self.skip_batches = skip_batches

    def __len__(self) -> int:
        return len(self.base_dataloader) - self.skip_batches

    def __iter__(self) -> Iterator[Any]:
        return islice(self.base_dataloader, self.skip_batches, None)


class SkipDataLoader(DataLoaderShard):
    """A loader without its first batches, which are read all the same.

    Args:
        dataset: a DataLoader with them; or a dataset, of which one is made.
        skip_batches: how many are left out.
        use_stateful_dataloader: keep the position, by torchdata's loader.
        **options: of the DataLoader that is made.
    """

    def __init__(
        self,
        dataset: Any,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            dataset,
            skip_batches=skip_batches,
            use_stateful_dataloader=use_stateful_dataloader,
            **options,
        )


# What Accelerate calls the parts of which its prepared loaders consist.
DataLoaderAdapter = DataLoaderShard
DataLoaderStateMixin = DataLoaderShard
