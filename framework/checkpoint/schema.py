"""What a checkpoint holds, and so what resuming needs: one schema for the Trainer's and the Engine's."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import torch

from ...strategies.stored_tensors import stored_items
from .serialization import State
from .stages import RunningStage, TrainerFn, TrainerStatus
from .token_count import TokenCount, TokenState


class Checkpoint(TypedDict, total=False):
    """All of a checkpoint. One of weights alone lacks most, and an Engine's what only a Trainer has."""

    # Both levels: the first model, further ones, and what trains them.
    epoch: int
    global_step: int
    state_dict: State
    more_state_dicts: list[Any]
    # Other weights of the first model, such as their average, by name.
    weight_sets: dict[str, State]
    optimizer_states: list[Any]
    lr_schedulers: list[Any]
    scaler: State
    # By rank, of each training loader; and the number from which they draw the data's order.
    loader_states: list[list[LoaderState]]
    data_seed: int | None
    # By rank: states of random generators.
    rng: list[Any]

    # An Engine's: how many models there are, and the states of registered objects.
    models: int
    registered: list[Any]

    # A Trainer's. The callbacks' states go by `Callback.state_key`.
    run: Run
    callbacks: State
    loggers: list[Any]
    # Of the run's record, as `NoRecord` of framework/loop/record.py describes it.
    record: State | None
    optimizer_kinds: list[Any]
    datamodule: Any
    hyper_parameters: Any
    datamodule_hyper_parameters: Any

    # Added when it is read.
    manifest: State


class Run(TypedDict):
    """How far a Trainer's run has come.

    Attributes:
        state: the counters, as of :class:`RunState`.
        logged: by rank: what has been logged in the running epoch; of the main rank alone, if it saved alone.
        saved_by: how many ranks read the epoch's data.
    """

    state: State
    logged: list[Logged]
    saved_by: int


class Logged(TypedDict):
    """What one rank has logged in the running epoch: as of ``Metrics.state_dict`` and ``metric_states``."""

    metrics: State
    metric_states: dict[str, MetricState]


class MetricState(TypedDict):
    """The state of a torchmetrics ``Metric``."""

    update_count: int
    state: State


class LoaderState(TypedDict):
    """How far one rank has come in a training loader.

    Attributes:
        epoch: index of the epoch to read next.
        batches: of that epoch, given so far.
        loader: the loader's own state, if it keeps one.
        part: which data the epoch consists of, if not all.
        cursor: how far all ranks together have come; None if nothing was read.
    """

    epoch: int
    batches: int
    loader: Any
    part: PartOfEpoch | None
    cursor: Cursor | None


class PartOfEpoch(TypedDict):
    """What was left of an epoch that other ranks had begun, or the same ones with another batch size.

    Attributes:
        first: ``batch_idx`` at which these ranks took over.
        begin: where their data begins, in the units of :class:`Cursor`.
        end: where it ends; None for the epoch's end.
    """

    first: int
    begin: int
    end: int | None


class LeftOut(TypedDict):
    """Data of an epoch that no rank trains on.

    Attributes:
        epoch: index of the epoch.
        begin: where it begins, in the units of :class:`Cursor`.
        end: where it ends.
        in_samples: which of the two units.
    """

    epoch: int
    begin: int
    end: int
    in_samples: bool


class _Cursor(TypedDict):
    position: int
    end: int | None
    in_samples: bool
    batch_sizes: list[Any]
    dealt: bool


class Cursor(_Cursor, total=False):
    """How far all ranks together have come in an epoch.

    Attributes:
        position: what they have been given; in samples where the order is planned, else in the loader's batches.
        end: where the epoch ends for them; None for its end.
        in_samples: which of the two units.
        batch_sizes: of each loader, as far as it tells.
        dealt: whether batches of one loader are sharded; else each rank has a loader of its own.
        dealt_to: how many ranks get different batches; earlier versions saved the number of ranks only.
    """

    dealt_to: int


def check_shape(
    value: Any,
    shape: Any,
    name: str = "checkpoint",
) -> None:
    """Raise unless a value has the shape that a type hint describes.

    Args:
        value: what was read.
        shape: ``Any``, a class, a union, ``list[…]``, ``dict[str, …]`` or a ``TypedDict``.
        name: of the value, for the message.

    Raises:
        TypeError: if something in it has another type.
        KeyError: if an item is missing.
    """
    kinds = get_args(shape) if isinstance(shape, UnionType) else (shape,)
    if Any in kinds or type(value) in kinds:
        return
    for kind in kinds:
        if is_typeddict(kind) and isinstance(value, dict):
            for key, item in get_type_hints(kind).items():
                if key in value or key in kind.__required_keys__:
                    check_shape(value[key], item, f"{name}.{key}")
            return
        if get_origin(kind) is dict and isinstance(value, dict):
            for key, item in stored_items(value).items():
                check_shape(item, get_args(kind)[1], f"{name}.{key}")
            return
        if get_origin(kind) is list and isinstance(value, list):
            for item in value:
                check_shape(item, get_args(kind)[0], name)
            return
    raise TypeError(f"{name} is {reprlib.repr(value)}")


class ValidationMark(TypedDict):
    """Where the interval between validations stands.

    Attributes:
        interval: the interval, as text.
        mark: at how many steps or tokens the next validation is due, or for a time, how much of it has passed.
    """

    interval: str
    mark: float


@dataclass
class RunState:
    """The counters of a run, which a checkpoint holds, and what the Trainer is doing now, which it does not hold.

    Attributes:
        epoch: index of the running epoch, which is the number of completed ones.
        batch_idx: micro-batches finished in this epoch: the data cursor.
        past_batches: micro-batches finished in the epochs before.
        global_step: completed optimizer windows, whatever the number of optimizers.
        validated: ``batch_idx`` after which validation ran last in this epoch, or -1.
        accumulate_grad_batches: the Trainer's, if that was set while the run went on.
        validation: where an interval between validations stood, in a run that is resumed.
        validation_batches: how many batches of each validation loader the validations have had, if that was logged by.
        tokens: the weights that ``training_step`` has returned.
        plateau_waits: whether schedulers that step every so many steps by a monitored value wait for the validation
            that is due at ``batch_idx``.
        batches_done: the epoch's batches have all been trained on, and its epoch-wise schedulers have stepped.
        epoch_done: all that belongs to this epoch has been done, its end hooks too; the next thing is a new epoch.
        seed: from which the order of the data is drawn.
        micro_batch: samples that a training step takes at once, if batches are run in parts.
        part: what the running epoch's data is for these ranks, if others began it, or with another batch size.
        left_out: data that is not trained on, of any epoch.
        fn: ``"fit"``, ``"validate"``, ``"test"``, ``"predict"`` or None. These three are texts and, by name and value,
            items of an enum: ``trainer.state.fn.value``.
        stage: ``"train"``, ``"sanity_check"``, ``"validate"``, ``"test"``, ``"predict"`` or None.
        status: ``"initializing"``, ``"running"``, ``"finished"``, ``"failed"`` or ``"interrupted"``.
    """

    epoch: int = 0
    batch_idx: int = 0
    past_batches: int = 0
    global_step: int = 0
    validated: int = -1
    batches_done: bool = False
    epoch_done: bool = False
    seed: int | None = None
    micro_batch: int | None = None
    part: PartOfEpoch | None = None
    left_out: list[LeftOut] | None = None
    plateau_waits: bool | None = None
    accumulate_grad_batches: int | None = None
    validation: ValidationMark | None = None
    validation_batches: list[int] | None = None
    tokens: TokenCount = field(default_factory=TokenCount)
    fn: TrainerFn | None = None
    stage: RunningStage | None = None
    status: TrainerStatus = TrainerStatus.INITIALIZING

    @property
    def total_batches(self) -> int:
        """Micro-batches finished in the run."""
        return self.past_batches + self.batch_idx

    @property
    def where(self) -> str:
        """How far the run has come, as text for a message."""
        return f"epoch {self.epoch}, batch {self.batch_idx}, global step {self.global_step}"

    @property
    def finished(self) -> bool:
        """Whether the last run has come to its end, by no exception."""
        return self.status == "finished"

    # What the Trainer is doing.

    def begin(self, fn: str) -> None:
        """Begin ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``."""
        self.fn = TrainerFn(fn)
        self.stage = None if fn == "fit" else RunningStage(fn)

    def start(self) -> None:
        """What has begun is running from now on."""
        self.status = TrainerStatus.RUNNING

    def enter(self, stage: str | None) -> None:
        """Begin a stage: ``"train"``, ``"sanity_check"``, ``"validate"`` …, or None between stages."""
        self.stage = None if stage is None else RunningStage(stage)

    def end(self, status: str) -> None:
        """The run has ended, or is ending: ``"finished"``, ``"failed"`` or ``"interrupted"``."""
        self.status = TrainerStatus(status)

    def forget(self) -> None:
        """Count from the beginning, as for another module."""
        for name, (_, default) in _COUNTERS.items():
            setattr(self, name, default)
        self.tokens = TokenCount()

    def take(self, other: RunState) -> None:
        """Go on with another state, as of a run in another process."""
        for item in fields(self):
            setattr(self, item.name, getattr(other, item.name))

    # How far the run has come.

    def draw_seed(self) -> int:
        """The seed from which the order of the data is drawn: that of torch's generator at the first call."""
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**63
        return self.seed

    def share_seed(self, seed: int) -> None:
        """Draw the order of the data from the main rank's seed."""
        self.seed = seed

    def use_part(self, part: PartOfEpoch | None) -> None:
        """Let the running epoch have this part of the data."""
        self.part = part

    def leave_out(self, data: list[LeftOut]) -> None:
        """Do not train on this data, beside what is left out already."""
        known = self.left_out or []
        new = [item for item in data if item not in known]
        if new:
            self.left_out = [*known, *new]

    def use_micro_batch(self, size: int) -> None:
        """Take so many samples at once."""
        self.micro_batch = size

    def use_accumulation(self, num_batches: int) -> None:
        """Accumulate over so many batches, in the runs that resume this one, too."""
        self.accumulate_grad_batches = num_batches

    def count_validation(self, num_batches: list[int]) -> None:
        """So many batches of each validation loader have been evaluated in the run."""
        self.validation_batches = num_batches

    def mark_validated(self) -> None:
        """The validation that was due at this batch is done."""
        self.validated = self.batch_idx

    def wait_for_validation(self) -> None:
        """Let the schedulers that monitor a value by steps wait for the validation that is due at this batch."""
        self.plateau_waits = True

    def end_waiting(self) -> None:
        """These schedulers have stepped."""
        self.plateau_waits = False

    def end_batches(self) -> None:
        """The epoch's batches have all been trained on."""
        self.batches_done = True

    def end_epoch(self) -> None:
        """All that belongs to the epoch has been done but what follows it, such as saves."""
        self.epoch_done = True

    def next_epoch(self) -> None:
        """Go on to the next epoch's first batch."""
        self.epoch += 1
        self.past_batches += self.batch_idx
        self.batch_idx = 0
        self.validated = -1
        self.part = None
        self.batches_done = self.epoch_done = False

    def state_dict(self) -> State:
        """The counters."""
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return {**counters, "tokens": self.tokens.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Set the counters.

        Raises:
            KeyError: if one is missing.
            TypeError: if one is of another type.
            ValueError: if one is too small.
        """
        for name, (kind, least) in _COUNTERS.items():
            value = state.get(name) if least is None else state[name]
            check_shape(value, kind, name)
            if least is not None and value < least:
                raise ValueError(f"{name} is {value!r}")
            setattr(self, name, value)
        tokens = state.get("tokens")
        check_shape(tokens, TokenState | None, "tokens")
        self.tokens.load_state_dict(tokens)


# What a checkpoint holds of a RunState: each field's type, and its default. The default is also the least valid value,
# or None if the field may be missing. The fields left out say what this process is doing now.
_COUNTERS: dict[str, tuple[Any, Any]] = {
    item.name: (get_type_hints(RunState)[item.name], item.default)
    for item in fields(RunState)
    if item.name not in ("tokens", "fn", "stage", "status")
}


def loader_state(
    counters: State,
    loader: Any,
    cursor: Any,
) -> LoaderState:
    """The state of a Trainer's training loader, from the run's counters and what the loader says."""
    is_done = counters["epoch_done"]
    return {
        "epoch": counters["epoch"] + is_done,
        "batches": 0 if is_done else counters["batch_idx"],
        "part": None if is_done else counters.get("part"),
        "loader": loader,
        "cursor": cursor,
    }
