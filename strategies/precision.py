"""Precision policies: which numbers a module computes with, independent of where it runs.

A policy is plain data; a :class:`~loopwright.strategies.Strategy` is where it takes effect (autocast here, a
``MixedPrecisionPolicy`` under FSDP, a section of DeepSpeed's configuration there), so that any policy goes with any
strategy. For one of your own, make an instance with other fields, or subclass.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Precision:
    """A precision policy.

    Attributes:
        name: how it is called, such as ``"bf16-mixed"``.
        parameters: dtype in which parameters are kept and updated; None leaves the module's own.
        compute: dtype of the forward pass under autocast; None switches autocast off.
        reduce: dtype in which gradients are reduced over processes; None is the gradients' own.
        buffers: dtype of floating-point buffers; None leaves the module's own.
        loss_scaling: scale the loss so that small fp16 gradients survive (``torch.amp.GradScaler``).
        init_scale: the loss scale at the beginning.
        growth_factor: by which it is multiplied after ``growth_interval`` steps without an overflow.
        backoff_factor: by which it is multiplied after an overflow, which skips the step.
        growth_interval: in optimizer steps.

    Raises:
        ValueError: for factors that would not let the scale grow, or not let it shrink.
    """

    name: str
    parameters: torch.dtype | None = None
    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    buffers: torch.dtype | None = None
    loss_scaling: bool = False
    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        for field in fields(self):
            # A subclass may set a field as a class attribute, over which the constructor has just put the default.
            of_class = getattr(type(self), field.name, field.default)
            is_default = getattr(self, field.name) == field.default
            if of_class != field.default and is_default:
                object.__setattr__(self, field.name, of_class)
        if (
            self.init_scale <= 0
            or self.growth_interval < 1
            or self.growth_factor <= 1
            or not 0 < self.backoff_factor < 1
        ):
            raise ValueError(
                f"precision={self.name!r}: the loss scale takes init_scale above 0, growth_interval from 1, "
                f"growth_factor above 1 and backoff_factor between 0 and 1; got {self.scaling()}"
            )

    def scaling(self) -> dict[str, Any]:
        """Return the fields of the loss scale: arguments of ``torch.amp.GradScaler``."""
        names = ("init_scale", "growth_factor", "backoff_factor", "growth_interval")
        return {name: getattr(self, name) for name in names}

    def check(self, device: torch.device) -> None:
        """Raise unless ``device`` can compute in this precision, by computing something small in it.

        Raises:
            ValueError: naming the policy, the device and what the device said.
        """
        dtype = self.compute or self.parameters
        if dtype in (None, torch.float32):
            return
        try:
            # A Trainer may be made where gradients are off, such as in a hook of another one's evaluation.
            with torch.inference_mode(False), torch.enable_grad():
                x = torch.ones(2, 2, 4, 4, dtype=dtype, device=device)
                x.requires_grad_()
                weight = torch.ones(1, 2, dtype=dtype, device=device)
                y = nn.functional.conv2d(x, x) @ weight
                nn.functional.layer_norm(y, y.shape[-1:]).sum().backward()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"precision={self.name!r}: device {str(device)!r} has no kernels for {dtype} ({reason}); "
                'use precision="32-true", or "bf16-mixed" where the device has bfloat16'
            ) from error

    def convert_module(self, module: nn.Module) -> None:
        """Convert floating-point parameters and buffers in place."""
        if self.parameters is not None:
            _convert(module.parameters(), self.parameters)
        if self.buffers is not None:
            _convert(module.buffers(), self.buffers)

    @property
    def input_dtype(self) -> torch.dtype | None:
        """dtype into which floating-point inputs are converted; None leaves them."""
        return self.parameters if self.compute is None else None

    def forward_context(self, device: torch.device) -> Any:
        """Return a context for forward passes, to be entered again and again, or None where none is needed."""
        if self.compute is not None:
            return torch.autocast(device.type, dtype=self.compute)
        if self.parameters not in (None, torch.float32):
            return _DefaultDtype(self.parameters)
        return None

    def init_context(self) -> Any:
        """Return a context in which modules are created in this precision."""
        if self.parameters is None:
            return nullcontext()
        return _DefaultDtype(self.parameters)


def _convert(tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


class _DefaultDtype:
    """A context in which tensors without a dtype get this one; unlike a generator, it can be entered again."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.previous: list[torch.dtype] = []

    def __enter__(self) -> None:
        self.previous.append(torch.get_default_dtype())
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.previous.pop())


def _true(name: str, dtype: torch.dtype) -> Precision:
    return Precision(name, parameters=dtype, reduce=dtype, buffers=dtype)


PRECISIONS = {
    policy.name: policy
    for policy in (
        Precision("32-true"),
        Precision("16-mixed", compute=torch.float16, loss_scaling=True),
        Precision("bf16-mixed", compute=torch.bfloat16),
        _true("16-true", torch.float16),
        _true("bf16-true", torch.bfloat16),
        _true("64-true", torch.float64),
    )
}

# The short forms that Lightning and Accelerate take.
ALIASES = {
    "32": "32-true",
    "no": "32-true",
    "64": "64-true",
    "16": "16-mixed",
    "fp16": "16-mixed",
    "bf16": "bf16-mixed",
}


def create_precision(precision: int | str | Precision) -> Precision:
    """Return the policy of that name, or the object itself.

    Raises:
        ValueError: for a name that is not known.
    """
    if isinstance(precision, Precision):
        return precision
    name = ALIASES.get(str(precision), str(precision))
    if name not in PRECISIONS:
        raise ValueError(
            f"precision must be a Precision or one of {', '.join(PRECISIONS)}; got {precision!r}"
        )
    return PRECISIONS[name]
