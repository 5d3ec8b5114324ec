"""The level below the Trainer: a device, a strategy and a precision, and the steps taken on them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..strategies import Precision, Strategy, create_strategy
from ..strategies.accelerator import select_devices
from ..strategies.launch import check_place, detect
from ..strategies.precision import create_precision
from .batches import cast_batch, map_tensors, move_batch


class Engine:
    """Runs steps of a module on the chosen devices, with the chosen strategy and precision.

    The Trainer's loops are written on these methods.

    Args:
        accelerator: ``"auto"``, ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"`` or ``"xpu"``.
        devices: a count, a list of indices, ``"auto"`` or -1.
        num_nodes: number of machines, or ``"auto"``: as many as a launcher says, else 1.
        strategy: a name or a :class:`~loopwright.strategies.Strategy`.
        precision: a name or a :class:`~loopwright.strategies.Precision`.
        sync_batchnorm: let batch norms compute their statistics over all processes.

    Raises:
        ValueError: for arguments that are unknown, or that this machine cannot serve; before anything is set up.
    """

    def __init__(
        self,
        accelerator: str = "auto",
        devices: int | str | list[int] = "auto",
        num_nodes: int | str = "auto",
        strategy: str | Strategy = "auto",
        precision: int | str | Precision = "32-true",
        sync_batchnorm: bool = False,
    ) -> None:
        self._asked = accelerator, devices, num_nodes
        self.precision = create_precision(precision)
        chosen, num_nodes = self._choose_devices()
        if devices == "auto" and strategy == "single" and self.place is None:
            chosen = chosen[:1]
        self.strategy = create_strategy(strategy, several=len(chosen) * num_nodes > 1)
        self.strategy.sync_batchnorm |= sync_batchnorm
        self.strategy.setup_environment(chosen, num_nodes, self.place)
        if not self.must_launch:  # else it is done in those processes, and takes no memory of a device here
            self.precision.check(self.device)
        scaled = self.precision.loss_scaling and not self.strategy.owns_loss_scale
        self.scaler = torch.amp.GradScaler(self.device.type) if scaled else None
        # forward(step_name, *args) and evaluate(step_name, *args) call a step of the module, for training and for
        # evaluation: the strategy's own methods, without a frame between.
        self.forward: Callable[..., Any] = self.strategy.forward
        self.evaluate: Callable[..., Any] = self.strategy.evaluate
        self._unscaled: set[int] = set()  # optimizers whose gradients are no longer scaled in this window
        self._stepped: set[int] = set()
        self._updated = False  # whether the last scaled step took place

    def _choose_devices(self) -> tuple[list[torch.device], int]:
        """The devices of this machine's processes, and the number of machines."""
        accelerator, devices, asked = self._asked
        if asked != "auto" and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 1):
            raise ValueError(f'num_nodes must be an integer from 1, or "auto"; got {asked!r}')
        self.place = place = detect()
        if place is not None:
            check_place(place, None, None if asked == "auto" else int(asked))
            return select_devices(accelerator, devices, place), place.num_nodes
        if asked not in ("auto", 1):
            raise ValueError(
                f"num_nodes={asked}: start the program on each of the machines, such as with torchrun --nnodes {asked} "
                f"--nproc-per-node {devices} --rdzv-backend c10d --rdzv-endpoint HOST:PORT script.py, or with srun"
            )
        return select_devices(accelerator, devices), 1

    def find_place(self) -> None:
        """Look once more where this process stands: it was started with this engine in its hands."""
        devices, num_nodes = self._choose_devices()
        self.strategy.setup_environment(devices, num_nodes, self.place)
        self.precision.check(self.device)

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.strategy.device

    @property
    def must_launch(self) -> bool:
        """Whether the processes of this engine are still to be started."""
        return self.place is None and self.strategy.world_size > 1

    # -- modules, batches -------------------------------------------------------------------------------------

    def setup(self, module: nn.Module) -> nn.Module:
        """Move a module to the device and into the precision."""
        return self.strategy.setup(module, self.precision)

    def setup_optimizers(self, optimizers: list[Optimizer]) -> list[Optimizer]:
        """Take the module's optimizers; returns those to step."""
        optimizers = self.strategy.setup_optimizers(optimizers)
        if self.scaler is not None:
            for optimizer in optimizers:
                optimizer.register_step_post_hook(self._note_step)
        return optimizers

    def _note_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._updated = True

    @property
    def step_was_skipped(self) -> bool:
        """Whether a gradient overflowed in the last :meth:`step`, so that nothing was updated."""
        return self.scaler is not None and not self._updated

    @property
    def moves_batches(self) -> bool:
        """Whether :meth:`to_device` does anything."""
        return self.device.type != "cpu" or self.precision.input_dtype is not None

    def to_device(self, batch: Any) -> Any:
        """Move a batch's tensors to the device, and convert them where the precision says so."""
        batch = move_batch(batch, self.device)
        dtype = self.precision.input_dtype
        return batch if dtype is None else cast_batch(batch, dtype)

    # -- steps ------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *args: Any, run: Callable[..., Any] | None = None, **kwargs: Any) -> None:
        """Compute the gradients of ``loss``, scaled if the precision says so.

        Args:
            loss: a scalar.
            *args: for ``Tensor.backward``.
            run: called with the scaled loss instead of the strategy's backward.
            **kwargs: for ``Tensor.backward``.
        """
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        run = run or self.strategy.backward
        if self.strategy.in_step:
            self.strategy.prepare_backward(loss)
        if self.precision.compute is not None and torch.is_autocast_enabled(self.device.type):
            # Manual optimization calls this inside the step: backward repeats each operation in its forward's type.
            with torch.autocast(self.device.type, enabled=False):
                run(loss, *args, **kwargs)
        else:
            run(loss, *args, **kwargs)

    def no_sync(self) -> AbstractContextManager[Any]:
        """A context around forward and backward in which gradients stay local to the process."""
        return self.strategy.no_sync()

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring an optimizer's gradients back to their true size, once per step."""
        if self.scaler is None or id(optimizer) in self._unscaled:
            return
        if id(optimizer) in self._stepped:
            # A second step in one window: this optimizer begins anew, at the same scale, which other gradients still
            # carry. GradScaler has no call for that; what it noted of the first step is kept under another key, so
            # that update() takes its overflow into account.
            states = self.scaler._per_optimizer_states
            states[len(states)] = states.pop(id(optimizer))
            self._stepped.discard(id(optimizer))
        self.scaler.unscale_(optimizer)
        self._unscaled.add(id(optimizer))

    def clip_gradients(self, optimizer: Any, value: float | None, algorithm: str = "norm") -> None:
        """Clip the gradients of an optimizer's parameters by their global ``"norm"`` or each by ``"value"``."""
        if not value:
            return
        if algorithm not in ("norm", "value"):
            raise ValueError(f'the clipping algorithm must be "norm" or "value"; got {algorithm!r}')
        optimizer = getattr(optimizer, "optimizer", optimizer)  # the wrapper of manual optimization
        self.unscale(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.strategy.clip_gradients(parameters, value, algorithm)

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """Step an optimizer; under loss scaling, not if a gradient overflowed."""
        if self.scaler is None:
            return self.strategy.step(optimizer) if closure is None else optimizer.step(closure)
        if closure is not None:
            raise RuntimeError(
                f"an optimizer with a closure ({type(optimizer).__name__}) cannot be combined with loss scaling "
                f'(precision={self.precision.name!r}); use precision="bf16-mixed" or "32-true"'
            )
        self.unscale(optimizer)
        self._updated = False
        result = self.scaler.step(optimizer)  # reads whether a gradient overflowed: a host–device sync
        self._unscaled.discard(id(optimizer))
        self._stepped.add(id(optimizer))
        return result

    def end_window(self) -> None:
        """All optimizers of a window have stepped: adapt the loss scale."""
        if self.scaler is not None and self._stepped:
            self.scaler.update()
            self._stepped.clear()
            self._unscaled.clear()

    # -- peers ------------------------------------------------------------------------------------------------

    def all_gather(self, data: Any, sync_grads: bool = False) -> Any:
        """Gather the tensors in ``data`` from all processes, stacked along a new first dimension."""
        return map_tensors(data, lambda tensor: self.strategy.all_gather(tensor, sync_grads))
