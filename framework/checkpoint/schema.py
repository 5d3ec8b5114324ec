"""What a checkpoint of a run holds: its counters, and of which kind the rest is."""

from __future__ import annotations

import reprlib
from dataclasses import asdict, dataclass, fields
from operator import itemgetter
from typing import Any

import torch

from ..seed import isolated_rng, set_rng_state
from .manifest import naming_damage
from .reader import load_checkpoint

# What a state may hold, and of which kind it is.
_KINDS = {
    "global_step": int,
    "callbacks": dict,
    "loggers": list,
    "optimizer_states": list,
    "lr_schedulers": list,
}
# What each process keeps of a run, and what its position in the data is.
_OF_EACH_PROCESS = itemgetter(
    "metrics", "metric_states", "loader", "cursor", "saved_by"
)
_CURSOR = itemgetter("position", "end", "in_samples", "batch_sizes", "dealt")

# Fields that say what this process is doing now; they are not part of a checkpoint.
_TRANSIENT = ("fn", "stage", "status")


@dataclass
class RunState:
    """The counters of a run, and what the Trainer is doing now.

    Attributes:
        epoch: index of the running epoch, which is the number of completed ones.
        batch_idx: micro-batches finished in this epoch: the data cursor.
        past_batches: micro-batches finished in the epochs before.
        global_step: completed optimizer windows, whatever the number of optimizers.
        validated: ``batch_idx`` after which validation ran last in this epoch, or -1.
        accumulate_grad_batches: the Trainer's, if that was set while the run went on.
        plateau_waits: schedulers that monitor a value by steps wait for the validation that is due at ``batch_idx``.
        batches_done: the epoch's batches have all been trained on, and its epoch-wise schedulers have stepped.
        epoch_done: all that belongs to this epoch has been done, its end hooks too; the next thing is a new epoch.
        seed: from which the order of the data is drawn.
        micro_batch: samples that a training step takes at once, if batches are run in parts.
        part: if the running epoch was begun by another number of processes, or with another batch size: ``first``, the
            ``batch_idx`` at which this one took over, and what was left of the data, from ``begin`` to ``end``.
        fn: ``"fit"``, ``"validate"``, ``"test"``, ``"predict"`` or None.
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
    part: dict[str, Any] | None = None
    plateau_waits: bool | None = None
    accumulate_grad_batches: int | None = None
    fn: str | None = None
    stage: str | None = None
    status: str = "initializing"

    @property
    def total_batches(self) -> int:
        """Micro-batches finished in the run."""
        return self.past_batches + self.batch_idx

    @property
    def where(self) -> str:
        """How far the run has come, in words."""
        return f"epoch {self.epoch}, batch {self.batch_idx}, global step {self.global_step}"

    # What the Trainer is doing.

    def begin(self, fn: str) -> None:
        """Begin ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``."""
        self.fn = fn
        self.stage = None if fn == "fit" else fn

    def start(self) -> None:
        """What has begun is running from now on."""
        self.status = "running"

    def enter(self, stage: str | None) -> None:
        """Begin a stage: ``"train"``, ``"sanity_check"``, ``"validate"`` …, or None between stages."""
        self.stage = stage

    def end(self, status: str) -> None:
        """The run has ended, or is ending: ``"finished"``, ``"failed"`` or ``"interrupted"``."""
        self.status = status

    def forget(self) -> None:
        """Count from the beginning, as for another module."""
        for field in fields(self):
            if field.name not in _TRANSIENT:
                setattr(self, field.name, field.default)

    def take(self, other: RunState) -> None:
        """Go on with another state, as of a run in another process."""
        for field in fields(self):
            setattr(self, field.name, getattr(other, field.name))

    # How far the run has come.

    def draw_seed(self) -> int:
        """The seed from which the order of the data is drawn: that of torch's generator when it was first asked."""
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**63
        return self.seed

    def share_seed(self, seed: int) -> None:
        """Draw the order of the data from the main rank's seed."""
        self.seed = seed

    def use_micro_batch(self, size: int) -> None:
        """Take so many samples at once."""
        self.micro_batch = size

    def use_accumulation(self, num_batches: int) -> None:
        """Accumulate over so many batches, in the runs that resume this one, too."""
        self.accumulate_grad_batches = num_batches

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

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return {
            key: value for key, value in asdict(self).items() if key not in _TRANSIENT
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the counters.

        Raises:
            KeyError: if one is missing.
            ValueError: if one is of another type, such as a not-a-number, or too small.
        """
        for field in fields(self):
            if field.name in _TRANSIENT:
                continue
            value: Any = (
                state.get(field.name) if field.default is None else state[field.name]
            )
            # An annotation is text here, such as "int | None".
            is_known = type(value).__name__ in str(field.type).replace(
                "None", "NoneType"
            )
            if not is_known or (field.default is not None and value < field.default):
                raise ValueError(f"{field.name} is {value!r}")
            setattr(self, field.name, value)


def run_states(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """The run's state of each process that saved it; empty where no run was saved."""
    if "run" not in checkpoint:
        return []
    return [checkpoint["run"], *checkpoint["run"].get("peers", [])]


def load_checked(path: str, weights_only: bool | None) -> dict[str, Any]:
    """``load_checkpoint``, of what is to be taken up: its state has the shape that this needs.

    Raises:
        CheckpointError: if it has not; to load the weights alone, it need not.
    """
    checkpoint = load_checkpoint(path, weights_only)
    with naming_damage(path, "its state is not as it should be"):
        for name, kind in _KINDS.items():
            value = checkpoint.get(name) or kind()
            if not isinstance(value, kind):
                raise TypeError(f"{name} is {reprlib.repr(value)}")
        with isolated_rng():
            for generators in checkpoint["rng"]:
                set_rng_state(generators)
        if "run" in checkpoint:
            itemgetter("world_size")(checkpoint["manifest"])
            state = RunState()
            state.load_state_dict(checkpoint["run"]["state"])
            if state.part is not None:
                itemgetter("first", "begin", "end")(state.part)
        for state_of_process in run_states(checkpoint):
            _, metric_states, _, cursor, _ = _OF_EACH_PROCESS(state_of_process)
            for metric in metric_states.values():
                itemgetter("update_count", "state")(metric)
            if cursor is not None:
                _CURSOR(cursor)
    return checkpoint
