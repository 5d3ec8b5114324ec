"""Loss scaling: half precision keeps small gradients if the loss is multiplied before the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...strategies.optimizer_state import parameters_of
from .step_errors import no_gradients


class LossScaler:
    """Scales losses, and gradients back before the optimizer steps, with torch's ``GradScaler``.

    ``GradScaler`` knows one step of each optimizer between two updates of its scale. Here an optimizer may step twice
    in an accumulation window, and another one may be unscaled and then not stepped.

    Args:
        scaler: torch's ``GradScaler``.
        precision: name of the precision, for messages.

    Attributes:
        scaler: as given.
        step_was_skipped: whether a gradient overflowed in the last step, so that nothing was updated.
    """

    def __init__(self, scaler: torch.amp.GradScaler, precision: str) -> None:
        self.scaler = scaler
        self.step_was_skipped = True
        self._precision = precision
        # The ids of optimizers whose gradients are at their true size and wait for the step.
        self._unscaled: set[int] = set()
        # The ids of optimizers that have stepped in this window.
        self._stepped: set[int] = set()

    def replace(self, scaler: torch.amp.GradScaler) -> None:
        """Scale with another one of torch's from the next window on."""
        self.scaler = scaler

    def watch(self, optimizer: Optimizer) -> None:
        """Look from now on whether steps of an optimizer take place.

        Raises:
            ValueError: if torch cannot scale the gradients of its parameters back.
        """
        for parameter in parameters_of(optimizer):
            is_half = parameter.is_complex() or parameter.dtype == torch.float16
            if parameter.requires_grad and is_half:
                raise ValueError(
                    f"precision={self._precision!r} scales the loss, and torch cannot scale the gradients of "
                    f"parameters in {parameter.dtype} back (one has shape {tuple(parameter.shape)}): use "
                    'precision="bf16-mixed" or "32-true", or make parameters in half precision float() ones'
                )
        optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, optimizer: Optimizer, *_: Any) -> None:
        self.step_was_skipped = False

    def scale(self, loss: Tensor) -> Tensor:
        """Scale a loss."""
        return self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring an optimizer's gradients back to their true size, once per step.

        Raises:
            RuntimeError: if it has no scaled gradients, as after ``loss.backward()``.
        """
        if id(optimizer) in self._unscaled:
            return
        if id(optimizer) in self._stepped:
            # This is a second step in one window. GradScaler would refuse it until update(), which must wait: it
            # changes the scale, which gradients of other optimizers still carry. So GradScaler is made to forget the
            # first step under this optimizer's id, and to keep it under another key for update() to look at.
            states = self.scaler._per_optimizer_states
            states[len(states)] = states.pop(id(optimizer))
            self._stepped.discard(id(optimizer))
        try:
            self.scaler.unscale_(optimizer)
        except AssertionError as error:
            raise RuntimeError(no_gradients(optimizer)) from error
        self._unscaled.add(id(optimizer))

    def share_overflow(self, optimizers: list[Optimizer]) -> None:
        """Let none of these step if a gradient of any overflowed; their gradients are unscaled already.

        Otherwise a common norm, to which all are clipped, would carry the overflow into those that are sound.
        """
        flags = []
        for optimizer in optimizers:
            flags += self.scaler._found_inf_per_device(optimizer).values()
        if flags:
            overflow = torch.stack([flag.to(flags[0].device) for flag in flags]).amax(0)
            for flag in flags:
                flag.copy_(overflow)

    def step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None = None
    ) -> Any:
        """Step an optimizer unless a gradient overflowed. A host–device sync.

        Raises:
            RuntimeError: with a closure, whose losses nobody would scale.
        """
        if closure is not None:
            raise RuntimeError(
                f"an optimizer with a closure ({type(optimizer).__name__}) cannot be combined with loss scaling "
                f'(precision={self._precision!r}); use precision="bf16-mixed" or "32-true"'
            )
        self.unscale(optimizer)
        # The hook of `watch` takes this back if the optimizer does step.
        self.step_was_skipped = True
        try:
            result = self.scaler.step(optimizer)
        except AssertionError as error:
            raise RuntimeError(no_gradients(optimizer)) from error
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # GradScaler calls a fused optimizer in any case, and its kernel updates nothing after an overflow. So the
            # hook does not tell. This waits for the device.
            overflows = self.scaler._found_inf_per_device(optimizer).values()
            self.step_was_skipped = any(bool(flag.item()) for flag in overflows)
        self._unscaled.discard(id(optimizer))
        self._stepped.add(id(optimizer))
        return result

    def end_window(self) -> None:
        """Adapt the scale: all optimizers of a window have stepped."""
        if self._stepped:
            self.scaler.update()
            self._stepped.clear()
        for optimizer_id in self._unscaled:
            # It was unscaled and not stepped: GradScaler would refuse to unscale it in the next window.
            self.scaler._per_optimizer_states.pop(optimizer_id, None)
        self._unscaled.clear()
