"""Notice a loss that spikes, and go on without the batch that did it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from logging import getLogger
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from .arguments import is_number, require, require_choice, require_int
from .base import Callback
from .intervals import steps_of
from .spike_baseline import Baseline

if TYPE_CHECKING:
    from ..framework import Module, Trainer

log = getLogger("loopwright")

# To go back to while there is no other checkpoint.
_START = "spike_detector-start.ckpt"


class SpikeError(RuntimeError):
    """The loss spiked once more than ``max_rollbacks`` or ``max_skips`` allows."""


class _Batch(NamedTuple):
    """A batch that was trained on: its epoch, its index, and the optimizer steps that were done after it."""

    epoch: int
    batch_idx: int
    step: int


class SpikeDetector(Callback):
    """Go back to a checkpoint when the loss spikes, and past the batch that did it; or skip the step.

    A spike is a loss that is NaN, infinite, or far above those before: see ``threshold``. All processes act on the
    spike of any of them. The log names the batch, and its samples by their indices in the dataset.

    With ``action="rollback"``, the losses stay on the device, and are read every ``every_n_steps`` optimizer steps,
    before each validation and checkpoint, and at each epoch's end: that waits for the device and, with several
    processes, takes a collective. After a spike, the run goes back to the newest checkpoint from before the batch that
    a callback of this fit has saved, or to the fit's beginning, which this callback saves. It goes on from there as a
    resumed run does, without the batches of the spike's accumulation window, and ends with the weights of a run whose
    data never had them. Later checkpoints hold what is left out. If the loss spikes right after two windows that
    were left out, the damage was done before, and the window before is left out, too.

    With ``action="skip"``, losses and the gradients' norm are read before each optimizer step, which waits for the
    device and, with several processes, takes a collective. After a spike, neither optimizers nor schedulers nor the
    loss scale step, and buffers, such as those of batch norm, and logged values are those of before the window.

    Args:
        action: ``"rollback"`` or ``"skip"``.
        threshold: how many standard deviations a loss may be above the median of the last ones. Both are robust, and
            taken of the losses and of their logarithms; the higher limit counts. Ten times the highest loss until then
            is a spike in any case.
        window: over how many losses they are taken, of all processes.
        warmup: how many losses there must have been. Before, only NaN, infinity and ten times the highest are spikes.
        every_n_steps: after how many optimizer steps to look, with ``"rollback"``.
        watch_gradients: also look at the norm of all gradients, in the same way. It is computed before each step.
            Default: with ``"skip"`` only.
        max_rollbacks: how often a run goes back; one more spike raises.
        max_skips: how many steps to skip one after the other; one more raises.
        every: instead of ``every_n_steps``, the same as text: ``"10 steps"``.

    Attributes:
        incidents: what was found, as dicts: ``epoch``, ``batches`` (``batch_idx`` of each), ``samples`` (indices in the
            dataset; with several loaders, pairs of a loader's number and an index; None if a loader has none),
            ``reason``, and the ``step`` before.
        rollbacks: how often the run went back.

    Raises:
        ValueError: for arguments that are not as above, or do not go with the Trainer.
        SpikeError: for a spike too many.
        CheckpointError: if the checkpoints to go back to are gone.
    """

    phase = "decide"

    def __init__(
        self,
        action: Literal["rollback", "skip"] = "rollback",
        threshold: float = 10.0,
        window: int = 100,
        warmup: int = 50,
        every_n_steps: int = 10,
        watch_gradients: bool | None = None,
        max_rollbacks: int = 10,
        max_skips: int = 10,
        *,
        every: str | None = None,
    ) -> None:
        every_n_steps = steps_of("every", every, every_n_steps)
        require_choice("action", action, "rollback", "skip")
        is_above = is_number(threshold) and threshold > 0
        require(is_above, "threshold", "a number above 0", threshold)
        require_int("window", window, 10)
        require_int("warmup", warmup, 0)
        require_int("every_n_steps", every_n_steps, 1)
        require_int("max_rollbacks", max_rollbacks, 0)
        require_int("max_skips", max_skips, 0)
        self.action = action
        self.every_n_steps = every_n_steps
        self.max_rollbacks = max_rollbacks
        self.max_skips = max_skips
        self.incidents: list[dict[str, Any]] = []
        self.rollbacks = 0
        self._losses = Baseline(window, warmup, threshold)
        self._norms = Baseline(window, warmup, threshold)
        # What is still to be looked at: batches with their losses, and the gradients' norms by step.
        self._pending: list[tuple[_Batch, Tensor]] = []
        self._pending_norms: dict[int, Tensor] = {}
        # The ordinary window before these, and the one before the last incident.
        self._last: list[_Batch] = []
        self._before_incident: list[_Batch] = []
        # The optimizer step that was looked at last.
        self._step = 0
        # With "skip": buffers and logged values at the window's begin, and steps skipped one after the other.
        self._kept: tuple[list[tuple[Tensor, Tensor]], Any] = ([], None)
        self._num_skipped = 0
        self._switch_off_hooks(watch_gradients)

    def _switch_off_hooks(self, watch_gradients: bool | None) -> None:
        """Set the hooks that this action does not need to None: then they are not called."""
        unused = ["on_train_batch_end", "on_train_epoch_end", "on_validation_start"]
        self._watches_gradients = watch_gradients is not False
        if self.action == "rollback":
            unused = ["on_train_batch_start", "on_before_backward"]
            self._watches_gradients = bool(watch_gradients)
            if not watch_gradients:
                unused.append("on_before_optimizer_step")
        vars(self).update(dict.fromkeys(unused))

    # -- the run ----------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.ckpt_path is not None or trainer.global_step > 0:
            return
        # A new run: what another one has left tells nothing of its losses.
        self.incidents = []
        self.rollbacks = 0
        self._losses.clear()
        self._norms.clear()
        self._last = []
        self._before_incident = []
        self._num_skipped = 0

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        self._pending = []
        self._pending_norms = {}
        self._step = trainer.global_step
        self._check(trainer)
        if self.action == "skip":
            return
        if trainer.ckpt_path is None and not trainer.fast_dev_run:
            trainer.checkpoints.save(_start_path(trainer), wait=True).finish()
        trainer.checkpoints.before_save[self] = partial(self._look, trainer)

    def _check(self, trainer: Trainer) -> None:
        """Raise for what the Trainer cannot do."""
        name = trainer.strategy.name
        if self.action == "skip" and not trainer.can_skip_step:
            raise ValueError(
                'SpikeDetector(action="skip") takes automatic optimization, an optimizer without a closure, and a '
                f'strategy other than DeepSpeed\'s (this is {name!r}): use action="rollback"'
            )
        if self._watches_gradients and name.startswith("deepspeed"):
            raise ValueError(
                f"SpikeDetector(watch_gradients=True): strategy={name!r} keeps the gradients to itself; leave it out"
            )

    def on_train_end(self, trainer: Trainer, pl_module: Module) -> None:
        path = _start_path(trainer)
        if trainer.is_global_zero and trainer.checkpoints.exists(path):
            trainer.checkpoints.remove(path)

    def state_dict(self) -> dict[str, Any]:
        return {
            "incidents": self.incidents,
            "rollbacks": self.rollbacks,
            "losses": self._losses.state_dict(),
            "norms": self._norms.state_dict(),
            "last": [list(batch) for batch in self._last],
            "before_incident": [list(batch) for batch in self._before_incident],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back a state; a run that goes back keeps what it has found since then."""
        if state_dict["rollbacks"] >= self.rollbacks:
            self.incidents = [dict(incident) for incident in state_dict["incidents"]]
            self.rollbacks = state_dict["rollbacks"]
            before = state_dict["before_incident"]
            self._before_incident = [_Batch(*batch) for batch in before]
        self._losses.load_state_dict(state_dict["losses"])
        self._norms.load_state_dict(state_dict["norms"])
        self._last = [_Batch(*batch) for batch in state_dict["last"]]

    # -- rollback ---------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if batch is None:
            return
        state = trainer.state
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if loss is None:
            self._require_loss(pl_module)
            return
        self._pending.append((_Batch(state.epoch, batch_idx, state.global_step), loss))
        if self._pending_norms and trainer.engine.step_was_skipped:
            # The loss scale was too high, which is no explosion.
            self._pending_norms.pop(state.global_step, None)
        if state.global_step - self._step >= self.every_n_steps:
            self._look(trainer)

    def _require_loss(self, pl_module: Module) -> None:
        """Raise where no step will ever give a loss to look at."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                'SpikeDetector looks at the loss that training_step returns: return it, or {"loss": loss}, from manual '
                "optimization, too"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        if not trainer.sanity_checking:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        """Read what is pending, and go back if it has a spike. A collective."""
        if not trainer.is_running or trainer.state.fn != "fit":
            return
        windows = self._complete_windows(trainer.window_is_open)
        if not windows:
            return
        norms = self._pending_norms
        self._pending_norms = {}
        losses = [loss for _, loss in chain.from_iterable(windows)]
        by_rank = _read(trainer, [*losses, *norms.values()])
        norm_of = dict(zip(norms, by_rank[0][len(losses) :], strict=True))
        columns = zip(*by_rank, strict=True)
        limits = self._losses.limit(), self._norms.limit()
        for window in windows:
            batches = [batch for batch, _ in window]
            values = [next(columns) for _ in window]
            step = batches[-1].step
            norm = [(norm_of[step],)] if step in norm_of else []
            reason, ranks = _spike(values, limits[0], "loss")
            if not reason:
                reason, ranks = _spike(norm, limits[1], "gradient norm")
                ranks = []
            if reason:
                self._go_back(trainer, batches, reason, ranks)
            self._losses.add(chain.from_iterable(values))
            self._norms.add(chain.from_iterable(norm))
            self._last = batches

    def _complete_windows(
        self, last_is_open: bool
    ) -> list[list[tuple[_Batch, Tensor]]]:
        """Take the pending batches by accumulation windows; those of one that is open still wait."""
        windows = []
        window: list[tuple[_Batch, Tensor]] = []
        for batch, loss in self._pending:
            if window and window[-1][0].epoch != batch.epoch:
                windows.append(window)
                window = []
            window.append((batch, loss))
            if batch.step > self._step:
                windows.append(window)
                window = []
                self._step = batch.step
        if window and not last_is_open:
            windows.append(window)
            window = []
        self._pending = window
        return windows

    def _go_back(
        self,
        trainer: Trainer,
        batches: list[_Batch],
        reason: str,
        ranks: list[int],
    ) -> None:
        """Go back to before these batches, and on without them."""
        before: list[_Batch] = []
        num_between = self._num_left_out_before(batches[0])
        if num_between == 0:
            self._before_incident = self._last
        elif num_between > 1:
            before = self._before_incident
            self._before_incident = []
        if before:
            why = f"those after it spike, of which {num_between} were left out"
            self._note(trainer, before, why, [])
        self._note(trainer, batches, reason, ranks)
        if self.rollbacks >= self.max_rollbacks:
            raise SpikeError(
                f"{self._told()}; the run went back {self.rollbacks} times (max_rollbacks={self.max_rollbacks}) before"
            )
        self.rollbacks += 1
        if trainer.is_global_zero:
            log.warning(
                "SpikeDetector: %s; going back, and on without it", self._told()
            )
        trainer.rewind([batch[:2] for batch in (*before, *batches)])

    def _num_left_out_before(self, batch: _Batch) -> int:
        """How many windows right before a batch were left out as incidents."""
        left_out = {
            (each["epoch"], each["batches"][-1]): each for each in self.incidents
        }
        count = 0
        place = batch.epoch, batch.batch_idx - 1
        while place in left_out:
            count += 1
            place = batch.epoch, left_out[place]["batches"][0] - 1
        return count

    # -- skip -------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: Module,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.window_is_open:
            return
        self._pending = []
        buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
        self._kept = buffers, trainer.metrics.copy_values()

    def on_before_backward(
        self, trainer: Trainer, pl_module: Module, loss: Tensor
    ) -> None:
        state = trainer.state
        # It was divided by the number of batches in the window.
        loss = loss.detach() * trainer.engine.accumulation.length
        batch = _Batch(state.epoch, state.batch_idx, state.global_step)
        self._pending.append((batch, loss))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: Module, optimizer: Any
    ) -> None:
        if self.action == "rollback":
            self._note_norm(trainer, optimizer)
        elif self._pending:
            # Once a step, whatever the number of optimizers.
            self._skip_or_pass(trainer)

    def _note_norm(self, trainer: Trainer, optimizer: Any) -> None:
        norm = _gradient_norm([optimizer])
        # The step that this one completes.
        step = trainer.global_step + 1
        if norm is not None and step in self._pending_norms:
            norm = torch.hypot(norm, self._pending_norms[step])
        if norm is not None:
            self._pending_norms[step] = norm

    def _skip_or_pass(self, trainer: Trainer) -> None:
        """Skip the step if it has a spike. A collective."""
        window = self._pending
        self._pending = []
        norm = None
        if self._watches_gradients:
            norm = _gradient_norm(trainer.optimizers)
        norms = [] if norm is None else [norm]
        by_rank = _read(trainer, [*(loss for _, loss in window), *norms])
        values = list(zip(*by_rank, strict=True))
        losses = values[: len(window)]
        norms_read = [column[:1] for column in values[len(window) :]]
        if trainer.engine.scaler is not None:
            # The scaler skips a step whose gradients overflow, and lowers the scale: that is no explosion.
            norms_read = [one for one in norms_read if math.isfinite(one[0])]
        reason, ranks = _spike(losses, self._losses.limit(), "loss")
        if not reason:
            reason, _ = _spike(norms_read, self._norms.limit(), "gradient norm")
        if not reason:
            self._num_skipped = 0
            self._losses.add(chain.from_iterable(losses))
            self._norms.add(chain.from_iterable(norms_read))
            return
        self._note(trainer, [batch for batch, _ in window], reason, ranks)
        self._num_skipped += 1
        if self._num_skipped > self.max_skips:
            raise SpikeError(
                f"{self._told()}; the {self.max_skips} steps before were skipped, too (max_skips)"
            )
        if trainer.is_global_zero:
            log.warning("SpikeDetector: %s; its step is skipped", self._told())
        trainer.skip_step()
        buffers, logged = self._kept
        for buffer, before in buffers:
            buffer.copy_(before)
        trainer.metrics.restore_values(logged)

    # -- what is said -----------------------------------------------------------------------------------------

    def _note(
        self,
        trainer: Trainer,
        batches: Sequence[_Batch],
        reason: str,
        ranks: list[int],
    ) -> None:
        """Add an incident; its samples are those of ``ranks``, or of all ranks if that is empty. A collective."""
        epoch = batches[0].epoch
        # A batch that is run in parts has several losses.
        indices = sorted({batch.batch_idx for batch in batches})
        own: list[Any] | None = []
        for batch_idx in indices:
            samples = trainer.samples_of(batch_idx, epoch)
            own = None if own is None or samples is None else [*own, *samples]
        by_rank = trainer.strategy.gather_objects(own)  # collective
        if ranks:
            by_rank = [by_rank[rank] for rank in ranks]
        samples = None
        if None not in by_rank:
            samples = list(dict.fromkeys(map(_plain, chain.from_iterable(by_rank))))
        self.incidents.append(
            {
                "epoch": epoch,
                "batches": indices,
                "samples": samples,
                "reason": reason,
                "step": trainer.global_step,
            }
        )

    def _told(self) -> str:
        """The last incident in words."""
        incident = self.incidents[-1]
        numbers = ", ".join(map(str, incident["batches"]))
        text = f"epoch {incident['epoch']}, batch {numbers}: {incident['reason']}"
        samples = incident["samples"]
        if samples is None:
            return f"{text}; its loader tells no indices of samples"
        return f"{text}; samples {', '.join(map(str, samples))} of the dataset"


def _start_path(trainer: Trainer) -> str:
    callback = trainer.checkpoint_callback
    folder = callback.dirpath if callback is not None else trainer.default_root_dir
    return os.path.join(str(folder), _START)


def _plain(index: Any) -> Any:
    """A sample's index as JSON can hold it."""
    return index if isinstance(index, (int, str, tuple)) else str(index)


def _read(trainer: Trainer, values: Iterable[Tensor]) -> list[list[float]]:
    """The numbers of all ranks. A host–device sync and a collective."""
    stacked = torch.stack([value.reshape(()) for value in values])
    own = stacked.cpu().double()
    table = torch.zeros(trainer.world_size, len(own), dtype=torch.float64)
    table[trainer.global_rank] = own
    return trainer.strategy.reduce(table, "sum").tolist()


def _gradient_norm(optimizers: Iterable[Any]) -> Tensor | None:
    """The norm of all gradients of these optimizers. Of shards, a collective."""
    gradients = [
        parameter.grad
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    if not gradients:
        return None
    norm: Any = get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _spike(
    values: Sequence[Sequence[float]], limit: float, name: str
) -> tuple[str, list[int]]:
    """What is too high among values of batches, each by rank, and on which ranks; an empty text if nothing is."""
    reason = ""
    ranks = set()
    for by_rank in values:
        for rank, value in enumerate(by_rank):
            if value <= limit and math.isfinite(value):
                continue
            ranks.add(rank)
            if math.isfinite(value):
                reason = f"its {name} is {value:.6g}, where {limit:.6g} is the limit"
            else:
                reason = f"its {name} is {value}"
    return reason, sorted(ranks)
