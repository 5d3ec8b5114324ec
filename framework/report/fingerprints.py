"""``Trainer(fingerprint=n)``: fingerprints of a training, kept in its record and compared between its processes."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...callbacks.base import Callback
from ...loggers.journal import Journal
from ...strategies.tensor_shards import TensorShard
from ..messages import log
from .departure import describe_departure
from .fingerprint import (
    as_hex,
    combined,
    fingerprints,
    finish,
    gradients_of,
    parameters_of,
    signed,
    sums_of,
)

if TYPE_CHECKING:
    from ...strategies import Strategy
    from ..module import Module
    from ..trainer import Trainer

FILE = "fingerprints.jsonl"


class Fingerprints(Callback):
    """Takes fingerprints of parameters, gradients and loss every so many optimizer steps.

    They are those right after the step: of the gradients with which the optimizer has stepped, averaged over processes
    and clipped, and of the parameters that it has left. It comes before callbacks that save, so that what it finds is
    not saved.

    Args:
        every_n_steps: how often.
    """

    phase = "decide"

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._journal: Journal | None = None
        # Lines that a disk has not taken.
        self._waiting: list[dict[str, Any]] = []
        self._last_step = -1
        # The last step at which all processes had the same parameters.
        self._agreed: int | None = None

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Refuse a strategy whose tensors cannot be read."""
        if stage == "fit" and not trainer.strategy.capabilities.has_plain_tensors:
            raise ValueError(
                f"fingerprint={self.every_n_steps}: strategy={trainer.strategy.name!r} keeps parameters and gradients "
                'outside of the module; fingerprints can be had under "single", "ddp" and "fsdp"'
            )

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Begin, or go on after the checkpoint's step: also after going back inside a run."""
        step = trainer.global_step
        self._last_step = step
        self._agreed = None
        self._begin_file(trainer)
        if step and trainer.world_size == 1:
            # A run that resumes has this line already.
            return
        values = self._take(trainer, pl_module, None)
        if step == 0:
            self._write({"step": 0, "epoch": trainer.current_epoch, **values})

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Take fingerprints, if a step has been taken and its number says so."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self._last_step:
            return
        self._last_step = step
        values = self._take(trainer, pl_module, loss_of(outputs))
        self._write({"step": step, "epoch": trainer.current_epoch, **values})

    def teardown(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Write no more."""
        if stage == "fit":
            self._write_waiting()
            self._journal = None

    def _begin_file(self, trainer: Trainer) -> None:
        """Go on in the record's file, after the steps that the run has behind it."""
        if not trainer.is_global_zero:
            return
        folder = trainer.record_dir
        if folder is None:
            compares = "compared between the processes, but " * (trainer.world_size > 1)
            log.warning(
                "fingerprint=%d: fingerprints are %skept nowhere, as this run has no record (logger=False, "
                "enable_record=False, barebones and fast_dev_run leave it out)",
                self.every_n_steps,
                compares,
            )
            return
        self._journal = Journal(os.path.join(folder, FILE))
        self._waiting = []
        try:
            rows = self._journal.read()
            done = trainer.global_step
            behind = [row for row in rows if row["step"] <= done] if done else []
            self._journal.rewind(len(behind))
        except (OSError, ValueError) as error:
            log.warning(
                "%s cannot be continued (%s): no fingerprints are kept", FILE, error
            )
            self._journal = None

    def _write(self, line: dict[str, Any]) -> None:
        if self._journal is not None:
            self._waiting.append(line)
            self._write_waiting()

    def _write_waiting(self) -> None:
        """Write the lines; a disk that takes none ends no training, which is said once."""
        if self._journal is None:
            return
        try:
            self._journal.append(self._waiting)
        except OSError as error:
            if len(self._waiting) == 1:
                log.warning("%s could not be written (%s): its lines wait", FILE, error)
            return
        self._waiting = []

    def _take(
        self, trainer: Trainer, module: Module, loss: Tensor | None
    ) -> dict[str, Any]:
        """Return what a line says; collectives, if there are several processes.

        Raises:
            RuntimeError: in all processes, if they should have the same parameters and do not.
        """
        strategy = trainer.strategy
        parameters = parameters_of(module)
        each = _fingerprints_on(strategy, [*parameters.values()])
        values = _as_line(strategy, module, loss, each)
        if strategy.world_size == 1:
            return values
        own = torch.tensor([signed(combined(each)), _bits_of(loss)])
        # A collective: two numbers of each process.
        gathered = strategy.all_gather(own.to(strategy.device)).tolist()
        if loss is not None:
            values["losses"] = [as_hex(bits) for _, bits in gathered]
        if not strategy.capabilities.shards_state:
            self._require_equal(trainer, module, each, [found for found, _ in gathered])
        return values

    def _require_equal(
        self, trainer: Trainer, module: Module, each: list[int], of_ranks: list[int]
    ) -> None:
        """Raise if the fingerprints of all parameters together, by rank, are not equal."""
        step = trainer.global_step
        if len(set(of_ranks)) == 1:
            self._agreed = step
            return
        shared = {
            name: (parameter, found)
            for (name, parameter), found in zip(
                parameters_of(module).items(), each, strict=True
            )
        }
        since = "They have not been compared before"
        if self._agreed is not None:
            since = (
                f"At step {self._agreed} all were equal: checkpoints that were saved later may hold the fault, go on "
                "from one before"
            )
        raise RuntimeError(
            f"{describe_departure(trainer.strategy, shared, of_ranks)} It was found at global step {step} "
            f"(fingerprint={self.every_n_steps}). {since}"
        )


def fingerprint_of(
    trainer: Trainer, module: Module, loss: Tensor | None
) -> dict[str, str | None]:
    """Return what a line of the record says of a step, right after the optimizer's.

    Args:
        trainer: whose run it is. Where processes have shards, all of them call this.
        module: its module.
        loss: what ``training_step`` has returned in the step's last batch, or None.

    Returns:
        ``"loss"``: the bits of the loss as float64, or None. ``"parameters"`` and ``"gradients"``: 16 hexadecimal
        digits each; the latter None if there are no gradients.
    """
    parameters = [*parameters_of(module).values()]
    each = _fingerprints_on(trainer.strategy, parameters)
    return _as_line(trainer.strategy, module, loss, each)


def loss_of(outputs: Any) -> Tensor | None:
    """Return the loss in what ``on_train_batch_end`` gets, or None if it holds no number for one."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else None
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _as_line(
    strategy: Strategy, module: Module, loss: Tensor | None, of_parameters: list[int]
) -> dict[str, Any]:
    gradients = [*gradients_of(module).values()]
    of_gradients = _fingerprints_on(strategy, gradients)
    return {
        "loss": None if loss is None else as_hex(_bits_of(loss)),
        "parameters": as_hex(combined(of_parameters)),
        "gradients": as_hex(combined(of_gradients)) if gradients else None,
    }


def _bits_of(loss: Tensor | None) -> int:
    """Return the bits of a loss as float64, in a signed integer. Reading it waits for the device."""
    number = 0.0 if loss is None else loss.item()
    bits: tuple[int] = struct.unpack(">q", struct.pack(">d", number))
    return bits[0]


def _fingerprints_on(strategy: Strategy, tensors: list[Tensor]) -> list[int]:
    """Return the fingerprints of whole tensors, of which each process may have a shard: then it is a collective."""
    if strategy.world_size == 1 or not strategy.capabilities.shards_state:
        return fingerprints(tensors)
    from ...strategies.distributed_tensors import to_shards

    parts: list[Tensor | TensorShard] = [*map(to_shards, tensors)]
    sums = []
    for part, total in zip(parts, sums_of(parts), strict=True):
        # What is not sharded is the same in all processes.
        is_owner = strategy.is_global_zero
        if isinstance(part, TensorShard):
            is_owner = part.is_owner
        sums.append(signed(total) if is_owner else 0)
    totals = strategy.reduce(torch.tensor(sums, device=strategy.device), "sum")
    return finish(parts, totals.tolist())
