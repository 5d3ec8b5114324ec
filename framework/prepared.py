"""What ``Engine.prepare`` returns: modules, optimizers, schedulers and loaders for a loop of one's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .batches import map_tensors
from .dealing import (
    SharedLoader,
    cursor_of,
    cut_to,
    data_place,
    gives_parts,
    parts_of,
    require_resumable,
    rest_of_epoch,
)
from .loaders import (
    INFINITE,
    CombinedEpochLoader,
    EpochLoader,
    LookAhead,
    by_epochs,
    exact_length,
)
from .seed import isolated_rng, mix_seeds

if TYPE_CHECKING:
    from ..strategies.base import Strategy
    from ..strategies.precision import Precision
    from .engine import Engine


# -- modules ----------------------------------------------------------------------------------------------------------


class _PreparedModule:
    """A module's second face: it shares its attributes, and is called through a strategy.

    :func:`prepare_module` makes a class of this and the module's own, whose instance has the module's ``__dict__``: so
    it is the module in all but its call, without a name more in its ``state_dict``. A copy of it is one of the module,
    with weights of its own, and so is what is pickled; that of a module in parts is refused.
    """

    _original: Any
    _run: tuple[Callable[..., Any], Callable[..., Any]]
    _single: bool  # whether what it returns is to be converted back from half precision

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The face is no subclass that the module's author wants to know of."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        train, evaluate = self._run
        output = (train if torch.is_grad_enabled() else evaluate)("__call__", *args, **kwargs)
        return map_tensors(output, _to_single) if self._single else output

    # The module's class may define these, as parametrized modules do; they would copy the face.

    def __copy__(self) -> Any:
        return copy.copy(self._whole())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._whole(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _same, (self._whole(),)

    def _whole(self) -> nn.Module:
        original: nn.Module = self._original
        if any(hasattr(tensor, "ds_id") or hasattr(tensor, "device_mesh") for tensor in original.parameters()):
            raise RuntimeError(
                f"this {type(original).__name__} is in parts, as its strategy spreads it over the processes: it cannot "
                "be copied or pickled. Copy it before prepare; save_model and save_state write its weights"
            )
        return original


def _same(module: Any) -> Any:
    return module


def _to_single(tensor: Any) -> Any:
    return tensor.float() if isinstance(tensor, Tensor) and tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def prepare_module(module: nn.Module, strategy: Strategy, precision: Precision) -> Any:
    """A face of ``module`` whose call is the strategy's step; under autocast it returns float32, as Accelerate does."""
    kind = type(module)
    members = {
        "_original": module,
        "_run": (strategy.forward, strategy.evaluate),
        "_single": precision.compute is not None,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "__qualname__": kind.__qualname__,
    }
    face = object.__new__(type(kind.__name__, (_PreparedModule, kind), members))
    object.__setattr__(face, "__dict__", module.__dict__)
    for name in (name for parent in kind.__mro__ for name in _slots(parent) if hasattr(module, name)):
        object.__setattr__(face, name, getattr(module, name))
    return face


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def bare(item: Any) -> Any:
    """What is behind anything that was prepared."""
    if isinstance(item, PreparedOptimizer):
        return item.optimizer
    if isinstance(item, PreparedScheduler):
        return item.scheduler
    return item.loader if isinstance(item, PreparedLoader) else unwrap(item)


def unwrap(module: Any) -> Any:
    """The module behind a prepared one."""
    return module._original if isinstance(module, _PreparedModule) else module


class Accumulation:
    """The context of ``Engine.accumulate``: as a class, it costs a fifth of what a generator does."""

    def __init__(self, engine: Engine, models: tuple[nn.Module, ...] = ()) -> None:
        self.engine, self.models = engine, models
        self.local: Any = None

    def __enter__(self) -> None:
        engine = self.engine
        engine.begin_micro_batch()
        if not engine.sync_gradients:
            self.local = engine.no_sync(*self.models)
            self.local.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.engine.accumulating = False
        if self.local is not None:
            local, self.local = self.local, None
            local.__exit__(*error)


# -- optimizers and schedulers ----------------------------------------------------------------------------------------


class PreparedOptimizer(Optimizer):
    """An optimizer that steps once a window. Everything else is the optimizer's own.

    Attributes:
        optimizer: the optimizer.
        step_was_skipped: whether its last step was left out, as a gradient overflowed in half precision.
    """

    def __init__(self, optimizer: Optimizer, engine: Engine) -> None:  # not Optimizer's: it is the other's face
        self.optimizer = optimizer
        self.engine = engine
        self.step_was_skipped = False
        self._stepped = False  # in this window
        self._to_clear = False  # it has stepped since its gradients were cleared
        self._given_up = False  # the window's gradients are to be cleared, unless it steps

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not there yet, as while unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def state(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride] # as Optimizer says it, but read only
        """The optimizer's."""
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride] # as above
        """The optimizer's."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Any:
        """The optimizer's."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as ``Optimizer.add_param_group``."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer's state."""
        self.optimizer.load_state_dict(state_dict)

    def train(self) -> Any:
        """Call the optimizer's own ``train``, where it has one (schedule-free optimizers)."""
        return getattr(self.optimizer, "train", lambda: None)()

    def eval(self) -> Any:
        """Call the optimizer's own ``eval``, where it has one."""
        return getattr(self.optimizer, "eval", lambda: None)()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, but not those of a window in which it is still to step.

        A window of several micro-batches that ends without a step is given up by it.
        """
        if self._stepped or self._to_clear or self.engine.window.length == 1:
            self._to_clear = False
            self.optimizer.zero_grad(set_to_none)
        else:
            self._given_up = self.engine.sync_gradients

    def begin_window(self) -> None:
        """A window begins."""
        if self._given_up and not self._stepped:
            self.optimizer.zero_grad()
        self._stepped = self._given_up = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step on the window's gradients; inside a window, nothing is done."""
        engine = self.engine
        if not engine.sync_gradients:
            return None
        result = engine.step_prepared(self.optimizer, closure)
        self._stepped = self._to_clear = True
        if engine.scaler is not None or engine.strategy.owns_loss_scale:
            self.step_was_skipped = engine.step_was_skipped
        return result

    def __repr__(self) -> str:
        return repr(self.optimizer)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _same, (self.optimizer,)


class PreparedScheduler:
    """A scheduler that steps once a window, and not where its optimizer's step was skipped.

    It steps once however many processes there are: its schedule counts optimizer steps.

    Attributes:
        scheduler: the scheduler; its attributes can be read through this.
    """

    def __init__(self, scheduler: Any, engine: Engine) -> None:
        self.scheduler = scheduler
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step, with the scheduler's own arguments; inside a window, nothing is done."""
        if self.engine.sync_gradients and not self.engine.step_of_was_skipped(
            getattr(self.scheduler, "optimizer", None)
        ):
            self.scheduler.step(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:  # a copy does not take the engine along
        return _same, (self.scheduler,)


# -- loaders ----------------------------------------------------------------------------------------------------------


class PreparedLoader:
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

    def __init__(self, loader: Any, engine: Engine, index: int = 0) -> None:
        self.loader, self.engine, self._index = loader, engine, index
        self._looks_ahead = exact_length(loader, trusts_samplers=engine.num_processes > 1) == INFINITE
        self.source: EpochLoader | CombinedEpochLoader | SharedLoader = self._by_epochs(engine.data_seed())
        if engine.num_processes > 1:
            strategy, asked = engine.strategy, engine.use_distributed_sampler
            own = gives_parts(self.source, strategy, asked, 0, "loader")
            self.source = SharedLoader(self.source, strategy, deal=not own, verify=asked is None)
        self.epoch = self.batches = 0
        self._read_part(None)
        self.share = 1.0
        self.end_of_dataloader = False
        self.batch: Any = None
        self._goes_on = False  # the next iteration begins at `batches`, where a checkpoint was saved

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        length = self.source.estimate if self.length == INFINITE else self.length
        if length == INFINITE:
            raise TypeError("the loader has no length")
        return int(length)

    @property
    def stateful(self) -> bool:
        """Whether the loader has a state of its own, which differs between processes."""
        return self.engine.num_processes > 1 and self._stateful

    def read_in_order_of(self, seed: int) -> None:
        """Draw the order of a shuffled loader from ``seed``: the first one as the Trainer does, others in their own."""
        shared = self.source if isinstance(self.source, SharedLoader) else None
        before = shared.loader if shared is not None else self.source
        if isinstance(before, EpochLoader) and before.keeps_iterator:  # which has been begun, and cannot be begun again
            before.seed = seed
        elif shared is None:
            self.source = self._by_epochs(seed)
        else:
            shared.take(self._by_epochs(seed))
            if isinstance(before, EpochLoader) and isinstance(shared.loader, EpochLoader):
                shared.loader.shards = before.shards
            if isinstance(before, CombinedEpochLoader) and isinstance(shared.loader, CombinedEpochLoader):
                shared.loader.deal_to([part.place for part in before.loaders])

    def _by_epochs(self, seed: int) -> EpochLoader | CombinedEpochLoader:
        loader = by_epochs(self.loader, seed if self._index == 0 else mix_seeds(seed, self._index))
        parts = parts_of(loader)
        # Of one that keeps its own state a batch is read ahead inside a window only: at its end, where checkpoints are
        # saved, that state must not be ahead.
        self._stateful = any(part.stateful for part in parts)
        for part in parts:
            part.read_ahead = self._looks_ahead and not self._stateful
        return loader

    def set_epoch(self, epoch: int) -> None:
        """Begin with the first batch of ``epoch`` when iterated next."""
        self.epoch, self.batches, self._goes_on = epoch, 0, False
        self._read_part(None)

    def _read_part(self, part: dict[str, Any] | None) -> None:
        """Give what was left of the epoch when these processes took it over, or all of it (None)."""
        length = cut_to(self.source, self.epoch, part)
        self._part, self.length = part, INFINITE if self._looks_ahead and part is None else length

    def __iter__(self) -> Iterator[Any]:
        return self.iterate()

    def iterate(self, start: int = 0) -> Iterator[Any]:
        """Iterate the epoch from batch ``start``, or from where a checkpoint was saved."""
        inside = self._goes_on and self.batches > 0
        if self._goes_on:
            start, self._goes_on = self.batches, False
        elif self.batches:
            self.epoch += 1  # the last one was left before its end
            self._read_part(None)
        if inside and start < self.length:
            require_resumable(self.source)
        self.batches = start
        first = 0 if self._part is None else self._part["first"]
        engine = self.engine
        engine.enter_loader(self)
        try:
            transfer = engine.to_device if engine.moves_batches else None
            with isolated_rng() if inside else nullcontext():  # the iterator draws a number, as it did before the save
                batches = iter(()) if start and start >= self.length else self.source.iterate(self.epoch, start - first)
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
            self._read_part(None)
        finally:
            self.batch = None
            engine.leave_loader(self)

    def _tells_end(self) -> bool:
        """Whether a batch may be read ahead, to tell if the running one is the last."""
        return not self._stateful or self.engine.goes_on_in_window()

    def state_dict(self) -> dict[str, Any]:
        """The place: the epoch, its batches given so far, less those of an open window; the loader's own state."""
        behind = self.engine.batches_of_open_window(self)
        batches = self.batches - behind
        first = self._part["first"] if self._part else 0
        done = not self.batches or batches >= self.length
        reads_again = self._looks_ahead and not self._stateful
        own = None if reads_again else self.source.state_dict(max(0, batches - first), done)
        cursor = cursor_of(self.source, data_place(self.engine.strategy)[1], batches, self._part)
        return {"epoch": self.epoch, "batches": batches, "loader": own, "part": self._part, "cursor": cursor}

    def load_state_dict(self, state: dict[str, Any], saved_by: int | None = None) -> None:
        """Go on from there when iterated next; ``saved_by`` tells how many processes saved it, if not as many as now.

        Raises:
            CheckpointError: if what they have left of the epoch cannot be dealt out to these.
        """
        world_size, part, batches = data_place(self.engine.strategy)[1], state["part"], state["batches"]
        if batches and (rest := rest_of_epoch(state["cursor"], self.source, saved_by or world_size, world_size)):
            part = {"first": batches, **rest}
        self.epoch, self.batches, self._goes_on = state["epoch"], batches, True
        self._read_part(part)
        if batches or world_size == (saved_by or world_size):  # others' states tell nothing about an epoch's end
            self.source.load_state_dict(state["loader"])

    def close(self) -> None:
        """End the workers."""
        self.source.close()


class SkippedLoader:
    """A loader without its first batches, in each iteration."""

    def __init__(self, loader: Any, skipped: int) -> None:
        self.loader, self.skipped = loader, skipped

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return max(0, len(self.loader) - self.skipped)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.loader, PreparedLoader):
            return self.loader.iterate(self.skipped)
        return islice(iter(self.loader), self.skipped, None)
