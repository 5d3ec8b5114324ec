"""Lightning's precisions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from ....strategies import Precision as NativePrecision
from ....strategies.precision import create_precision
from .utilities import apply_to_collection

__all__ = [
    "DoublePrecision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
    "precision_plugin",
]


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Make new tensors of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _fields(precision: NativePrecision) -> dict[str, Any]:
    return {name: getattr(precision, name) for name in precision.__dataclass_fields__}


class Precision(NativePrecision):
    """A :class:`~loopwright.strategies.Precision` with Lightning's methods.

    Args:
        name: of the precision.
        **fields: of :class:`~loopwright.strategies.Precision`.
    """

    def __init__(self, name: str = "32-true", **fields: Any) -> None:
        super().__init__(name, **fields)

    @property
    def precision(self) -> str:
        """Its name."""
        return self.name

    @property
    def _desired_input_dtype(self) -> torch.dtype | None:
        return self.parameters

    def convert_module(self, module: nn.Module) -> Any:
        """Convert a module's floating-point parameters and buffers in place; returns it."""
        super().convert_module(module)
        return module

    def convert_input(self, data: Any) -> Any:
        """A nesting whose floating-point tensors have the dtype that a forward pass takes."""
        return self._converted(data, self.input_dtype)

    def convert_output(self, data: Any) -> Any:
        """A nesting whose floating-point tensors have torch's default dtype."""
        return self._converted(data, torch.get_default_dtype())

    @staticmethod
    def _converted(data: Any, dtype: torch.dtype | None) -> Any:
        if dtype is None:
            return data

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return apply_to_collection(data, torch.Tensor, convert)

    def module_init_context(self) -> Any:
        """Make a module's parameters in this precision, inside a ``with`` block."""
        return _default_dtype(self.parameters)

    tensor_init_context = module_init_context

    def forward_context(self, device: torch.device | None = None) -> Any:
        """Compute in this precision, inside a ``with`` block.

        Args:
            device: where to; what a Trainer asks for gets what the strategy enters again and again, or None.
        """
        if device is not None:
            return super().forward_context(device)
        return _default_dtype(self.parameters)

    def train_step_context(self) -> Any:
        """As :meth:`forward_context`, for a training step."""
        return self.forward_context()

    def val_step_context(self) -> Any:
        """As :meth:`forward_context`, for a validation step."""
        return self.forward_context()

    def test_step_context(self) -> Any:
        """As :meth:`forward_context`, for a test step."""
        return self.forward_context()

    def predict_step_context(self) -> Any:
        """As :meth:`forward_context`, for a prediction step."""
        return self.forward_context()

    def connect(self, model: Any, optimizers: Any, lr_schedulers: Any) -> Any:
        """These three, as they are."""
        return model, optimizers, lr_schedulers

    def teardown(self) -> None:
        """Nothing is to be done at the end."""


class MixedPrecision(Precision):
    """Autocast, and for ``"16-mixed"`` a scaled loss.

    Args:
        precision: ``"16-mixed"`` or ``"bf16-mixed"``.
        device: for use by hand; the Trainer chooses the device.
        scaler: a ``torch.amp.GradScaler``, whose scale and factors are taken.

    Raises:
        ValueError: for another precision.
    """

    def __init__(self, precision: str, device: str = "cpu", scaler: Any = None) -> None:
        if precision not in ("16-mixed", "bf16-mixed"):
            raise ValueError(
                f"Passed `MixedPrecision(precision={precision!r})`. Precision must be '16-mixed' or 'bf16-mixed'."
            )
        values = _fields(create_precision(precision))
        if scaler is not None:
            values |= {
                "init_scale": scaler.get_scale(),
                "growth_factor": scaler.get_growth_factor(),
                "backoff_factor": scaler.get_backoff_factor(),
                "growth_interval": scaler.get_growth_interval(),
            }
        super().__init__(**values)
        # The fields are frozen.
        vars(self).update(device=device, scaler=scaler)

    def autocast_context_manager(self) -> torch.autocast:
        """Compute under autocast, inside a ``with`` block."""
        return torch.autocast(vars(self)["device"], dtype=self.compute)

    def forward_context(self, device: torch.device | None = None) -> Any:
        if device is not None:
            return super().forward_context(device)
        return self.autocast_context_manager()


class HalfPrecision(Precision):
    """Parameters of 16 bits.

    Args:
        precision: ``"16-true"`` or ``"bf16-true"``.
    """

    def __init__(self, precision: str = "16-true") -> None:
        super().__init__(**_fields(create_precision(precision)))


class DoublePrecision(Precision):
    """Parameters of 64 bits."""

    def __init__(self) -> None:
        super().__init__(**_fields(create_precision("64-true")))


@cache
def precision_plugin(precision: NativePrecision) -> Precision:
    """The object of Lightning's class for a precision."""
    if isinstance(precision, Precision):
        return precision
    if precision != create_precision(precision.name):
        return Precision(**_fields(precision))
    if precision.name.endswith("-mixed"):
        return MixedPrecision(precision.name)
    if precision.name == "64-true":
        return DoublePrecision()
    if precision.name in ("16-true", "bf16-true"):
        return HalfPrecision(precision.name)
    return Precision(**_fields(precision))
