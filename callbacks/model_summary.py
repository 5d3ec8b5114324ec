"""What a module is made of: its layers, their parameters and sizes."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .arguments import require_int
from .base import Callback

if TYPE_CHECKING:
    from ..framework import Module, Trainer

_DEPTHS = "-1 (all), 0 (nothing) or a positive int"
_NO_LAYER = "other params"  # those that hang directly on the root module


class ModelSummary(Callback):
    """Print a table of the module's layers when fitting begins.

    Args:
        max_depth: how deep to go into nested layers; -1 shows all, 0 prints nothing.

    Raises:
        ValueError: if ``max_depth`` is less than -1.
    """

    def __init__(self, max_depth: int = 1) -> None:
        require_int("max_depth", max_depth, -1, _DEPTHS)
        self._max_depth = max_depth

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        if self._max_depth == 0:
            return
        # A module in parts is called by its strategy only.
        with_sizes = not trainer.strategy.replaces_parameters or trainer.world_size == 1
        summary = summarize(
            module, self._max_depth, with_sizes
        )  # on all processes, as they may meet in its forward
        if trainer.is_global_zero:
            self.show(summary)

    def show(self, summary: Summary) -> None:
        """Print the summary, as a rich table if there is a terminal or notebook to print to."""
        from rich.console import Console
        from rich.table import Table

        console = Console()
        if not (console.is_terminal or console.is_jupyter):
            print(summary, flush=True)  # unlike a rich table, not cut at some width
            return
        table = Table(header_style="bold")
        for heading in summary.columns:
            table.add_column(
                heading,
                justify="right" if heading == "Params" else "left",
                no_wrap=heading == "Name",
            )
        for row in summary.rows:
            table.add_row(*row)
        console.print(table)
        console.print("\n".join(summary.totals), highlight=False)


@dataclass
class LayerSummary:
    """One row of a summary."""

    name: str  # as in `named_modules`
    type: str  # the class's name
    parameters: int  # how many numbers in its own parameters, without those that stand in an earlier layer already
    shared: bool = False  # whether it has such parameters
    lazy: bool = (
        False  # whether it has parameters that get their shape with the first batch
    )
    training: bool | None = (
        None  # whether it is in training mode; None if that has no meaning
    )
    in_size: Any = (
        None  # shape of what it took for `example_input_array`; None if not known
    )
    out_size: Any = None  # shape of what it returned


@dataclass
class Summary:
    """The layers of a module and their sum; its ``str`` is a table."""

    layers: list[LayerSummary] = field(
        default_factory=list
    )  # to the depth asked for, in the order of `named_modules`
    trainable: int = (
        0  # numbers in the parameters with `requires_grad`, shared ones counted once
    )
    frozen: int = 0  # and in those without
    bytes: int = 0  # memory that the parameters take
    sizes_shown: bool = False  # whether there was an `example_input_array`
    note: str = ""  # why sizes are missing although there was, or ""

    @property
    def total_parameters(self) -> int:
        return self.trainable + self.frozen

    @property
    def columns(self) -> list[str]:
        return [
            "Name",
            "Type",
            "Params",
            "Mode",
            *(["In sizes", "Out sizes"] if self.sizes_shown else []),
        ]

    @property
    def rows(self) -> list[list[str]]:
        rows = []
        for layer in self.layers:
            parameters = _readable(layer.parameters)
            if layer.lazy:
                parameters = "?" if not layer.parameters else f"{parameters} + ?"
            if layer.shared:
                parameters += " + shared"
            mode = (
                "" if layer.training is None else "train" if layer.training else "eval"
            )
            row = [layer.name, layer.type, parameters, mode]
            if self.sizes_shown:
                row += [
                    "?" if size is None else str(size)
                    for size in (layer.in_size, layer.out_size)
                ]
            rows.append(row)
        return rows

    @property
    def totals(self) -> list[str]:
        """Lines to stand below the table."""
        more = (
            " and those not yet known, marked ?"
            if any(layer.lazy for layer in self.layers)
            else ""
        )
        lines = [
            f"Trainable params: {_readable(self.trainable)}",
            f"Non-trainable params: {_readable(self.frozen)}",
            f"Total params: {_readable(self.total_parameters)}{more}, {self.bytes / 1e6:,.3f} MB",
        ]
        return [*lines, self.note] if self.note else lines

    def __str__(self) -> str:
        table = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        padded = [
            [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            for row in table
        ]
        lines = [" | ".join(row).rstrip() for row in padded]
        rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
        return "\n".join([lines[0], rule, *lines[1:], rule, *self.totals])


def summarize(
    module: nn.Module, max_depth: int = 1, with_sizes: bool = True
) -> Summary:
    """Summarize a module; if it has an ``example_input_array``, with the sizes that its layers take and return.

    For that it is called once, in evaluation mode and without gradients. Random generators, training modes and
    buffers are afterwards as they were.

    Args:
        module: any ``torch.nn.Module``.
        max_depth: how deep to go into nested layers; -1 shows all, 0 only the totals.
        with_sizes: whether it may be called.

    Raises:
        ValueError: if ``max_depth`` is less than -1.
    """
    require_int("max_depth", max_depth, -1, _DEPTHS)
    summary = Summary()
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if name and (max_depth == -1 or name.count(".") < max_depth)
    }
    sizes: dict[str, tuple[Any, Any]] = {}
    example = getattr(module, "example_input_array", None)
    if example is not None and max_depth != 0 and with_sizes:
        summary.sizes_shown = True
        sizes, summary.note = _record_sizes(module, layers, example)

    # A shared parameter is listed under the first name that leads to it.
    owners = dict(module.named_parameters())
    first_names = {id(parameter): name for name, parameter in owners.items()}
    for name, layer in layers.items():
        own = list(layer.parameters())
        counted = [
            parameter
            for parameter in own
            if first_names[id(parameter)].startswith(f"{name}.")
        ]
        row = LayerSummary(
            name,
            type(layer).__name__,
            sum(map(_count, counted)),
            training=layer.training,
        )
        row.shared = len(counted) < len(own)
        row.lazy = _any_lazy(own)
        row.in_size, row.out_size = sizes.get(name, (None, None))
        summary.layers.append(row)
    rest = [parameter for name, parameter in owners.items() if "." not in name]
    if rest and layers:
        summary.layers.append(
            LayerSummary(_NO_LAYER, "", sum(map(_count, rest)), lazy=_any_lazy(rest))
        )
    summary.trainable = sum(
        _count(parameter) for parameter in owners.values() if parameter.requires_grad
    )
    summary.frozen = sum(
        _count(parameter)
        for parameter in owners.values()
        if not parameter.requires_grad
    )
    summary.bytes = sum(
        _count(parameter) * parameter.dtype.itemsize for parameter in owners.values()
    )
    return summary


def _any_lazy(parameters: Iterable[Tensor]) -> bool:
    return any(
        isinstance(parameter, UninitializedParameter) for parameter in parameters
    )


def _count(parameter: Tensor) -> int:
    if isinstance(parameter, UninitializedParameter):
        return 0
    # DeepSpeed's ZeRO-3 leaves an empty tensor in place and notes the true size beside it.
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def _readable(number: int) -> str:
    """1234 as "1.2 K", in at most five characters up to trillions."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            value = number / size
            return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.1f} {unit}"
    return str(number)


# -- sizes ----------------------------------------------------------------------------------------------------------


def _record_sizes(
    module: nn.Module, layers: dict[str, nn.Module], example: Any
) -> tuple[dict[str, tuple[Any, Any]], str]:
    """Call the module with its example and note shapes; or say why that was not done."""
    if _any_lazy(module.parameters()):
        # A forward pass would initialise them now, with other random numbers than without a summary.
        return (
            {},
            "Sizes are not shown, as they depend on lazy parameters that the first batch initialises.",
        )
    sizes: dict[str, tuple[Any, Any]] = {}

    def note(name: str) -> Any:
        def hook(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            taken = (*args, *kwargs.values())
            sizes.setdefault(
                name, (_shape(taken[0] if len(taken) == 1 else taken), _shape(output))
            )

        return hook

    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            if not isinstance(layer, torch.jit.ScriptModule):  # which takes no hooks
                stack.callback(
                    layer.register_forward_hook(note(name), with_kwargs=True).remove
                )
        stack.enter_context(_unchanged(module))
        stack.enter_context(torch.no_grad())
        module.eval()
        example = _like_parameters(example, module)
        try:
            if isinstance(example, dict):
                module(**example)
            elif isinstance(example, (tuple, list)):
                module(*example)
            else:
                module(example)
        except (
            Exception
        ) as error:  # whatever the module's forward raises; a table is not worth a run
            return (
                sizes,
                f"Sizes are incomplete: forward(example_input_array) raised {type(error).__name__}: {error}",
            )
    return sizes, ""


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Put back training modes, buffers and random generators afterwards."""
    modes = [(layer, layer.training) for layer in module.modules()]
    buffers = [
        (layer._buffers, name, buffer, buffer.detach().clone())
        for layer in module.modules()
        for name, buffer in layer._buffers.items()
        if buffer is not None
    ]
    devices = {
        parameter.device
        for parameter in module.parameters()
        if parameter.device.type not in ("cpu", "meta")
    }
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = (
        random.getstate(),
        numpy.random.get_state() if numpy else None,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # the CPU's
        for device in devices:
            stack.enter_context(
                torch.random.fork_rng(
                    devices=[device.index or 0], device_type=device.type
                )
            )
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)
            for layer, training in modes:
                layer.training = training
            with torch.no_grad():
                for place, name, buffer, value in buffers:
                    buffer.copy_(value)
                    place[name] = (
                        buffer  # where forward put another tensor instead of changing this one
                    )


def _like_parameters(example: Any, module: nn.Module) -> Any:
    """The example on the module's device, its floats in the module's dtype."""
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    if first is None:
        return example
    if isinstance(example, Tensor):
        return example.to(
            first.device, first.dtype if example.is_floating_point() else None
        )
    if isinstance(example, dict):
        return {key: _like_parameters(value, module) for key, value in example.items()}
    if isinstance(example, (tuple, list)):
        return [_like_parameters(value, module) for value in example]
    return example


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, dict):
        return {key: _shape(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_shape(item) for item in value]
    return None
