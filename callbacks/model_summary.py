"""What a module is made of: its layers, their parameters and sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .arguments import require_int
from .base import Callback
from .layer_sizes import is_lazy, record_sizes

if TYPE_CHECKING:
    from rich.console import Console

    from ..framework import Module, Trainer

_DEPTHS = "-1 (all), 0 (nothing) or a positive int"
# The row of the parameters that hang directly on the root module.
_NO_LAYER = "other params"


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

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._max_depth == 0:
            return
        # A module whose parameters are shards is called by its strategy only.
        with_sizes = (
            not trainer.strategy.capabilities.replaces_parameters
            or trainer.world_size == 1
        )
        # On all processes, as the module's forward may have collectives.
        summary = summarize(pl_module, self._max_depth, with_sizes)
        if trainer.is_global_zero:
            self.show(summary)

    def show(self, summary: Summary) -> None:
        """Print the summary, as a rich table if there is a terminal or notebook to print to."""
        from rich.console import Console

        console = Console()
        if console.is_terminal or console.is_jupyter:
            _draw(summary, console, "bold")
        else:
            # Unlike a rich table, it is not cut at some width.
            print(summary, flush=True)


class RichModelSummary(ModelSummary):
    """The same, drawn by rich wherever it is printed to, a file too.

    Args:
        max_depth: how deep to go into nested layers; -1 shows all, 0 prints nothing.
        header_style: rich's style of the headings.

    Raises:
        ValueError: if ``max_depth`` is less than -1.
    """

    def __init__(self, max_depth: int = 1, header_style: str = "bold magenta") -> None:
        super().__init__(max_depth)
        self._header_style = header_style

    def show(self, summary: Summary) -> None:
        from rich.console import Console

        _draw(summary, Console(), self._header_style)


def _draw(summary: Summary, console: Console, header_style: str) -> None:
    from rich.table import Table

    table = Table(header_style=header_style)
    for heading in summary.columns:
        justify = "right" if heading == "Params" else "left"
        table.add_column(heading, justify=justify, no_wrap=heading == "Name")
    for row in summary.rows:
        table.add_row(*row)
    console.print(table)
    console.print("\n".join(summary.totals), highlight=False)


@dataclass
class LayerSummary:
    """One row of a summary.

    Attributes:
        name: as in ``named_modules``.
        type: the class's name.
        parameters: how many numbers are in its parameters, without those that an earlier row counts.
        shared: whether it has parameters that an earlier row counts.
        lazy: whether it has parameters that get their shape with the first batch.
        mode: ``"train"``, ``"eval"``, or "" where that has no meaning.
        in_size: shape of what it took for ``example_input_array``; None if that is not known.
        out_size: shape of what it returned.
    """

    name: str
    type: str
    parameters: int
    shared: bool = False
    lazy: bool = False
    mode: str = ""
    in_size: object = None
    out_size: object = None


@dataclass
class Summary:
    """The layers of a module and their sum; its ``str`` is a table.

    Attributes:
        layers: to the chosen depth, in the order of ``named_modules``.
        trainable: numbers in the parameters with ``requires_grad``, shared ones counted once.
        frozen: numbers in the others.
        bytes: memory that the parameters take.
        sizes_shown: whether there was an ``example_input_array``.
        note: why sizes are missing although there was one, or "".
    """

    layers: list[LayerSummary] = field(default_factory=list)
    trainable: int = 0
    frozen: int = 0
    bytes: int = 0
    sizes_shown: bool = False
    note: str = ""

    @property
    def total_parameters(self) -> int:
        """Numbers in all parameters, shared ones counted once."""
        return self.trainable + self.frozen

    @property
    def trainable_parameters(self) -> int:
        """Numbers in the parameters that are trained."""
        return self.trainable

    @property
    def model_size(self) -> float:
        """Memory that the parameters take, in megabytes (10⁶ bytes)."""
        return self.bytes / 1e6

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers, to the chosen depth."""
        return [layer.name for layer in self.layers if layer.name != _NO_LAYER]

    @property
    def layer_types(self) -> list[str]:
        """Their classes' names."""
        return [layer.type for layer in self.layers if layer.name != _NO_LAYER]

    @property
    def param_nums(self) -> list[int]:
        """Numbers in their parameters, without those that an earlier layer counts."""
        return [layer.parameters for layer in self.layers if layer.name != _NO_LAYER]

    @property
    def columns(self) -> list[str]:
        """Headings of the table."""
        sizes = ["In sizes", "Out sizes"] if self.sizes_shown else []
        return ["Name", "Type", "Params", "Mode", *sizes]

    @property
    def rows(self) -> list[list[str]]:
        """Cells of the table, by layer."""
        rows = []
        for layer in self.layers:
            parts = []
            if layer.parameters or not layer.lazy:
                parts.append(_readable(layer.parameters))
            if layer.lazy:
                parts.append("?")
            if layer.shared:
                parts.append("shared")
            row = [layer.name, layer.type, " + ".join(parts), layer.mode]
            if self.sizes_shown:
                for size in (layer.in_size, layer.out_size):
                    row.append("?" if size is None else str(size))
            rows.append(row)
        return rows

    @property
    def totals(self) -> list[str]:
        """Lines to stand below the table."""
        more = ""
        if any(layer.lazy for layer in self.layers):
            more = " and those not yet known, marked ?"
        lines = [
            f"Trainable params: {_readable(self.trainable)}",
            f"Non-trainable params: {_readable(self.frozen)}",
            f"Total params: {_readable(self.total_parameters)}{more}, {self.model_size:,.3f} MB",
        ]
        return [*lines, self.note] if self.note else lines

    def __str__(self) -> str:
        table = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for row in table:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append(" | ".join(cells).rstrip())
        rule = "-" * len(" | ".join("-" * width for width in widths))
        return "\n".join([lines[0], rule, *lines[1:], rule, *self.totals])


def summarize(
    module: nn.Module,
    max_depth: int = 1,
    with_sizes: bool = True,
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
    sizes = {}
    example = getattr(module, "example_input_array", None)
    if example is not None and max_depth != 0 and with_sizes:
        summary.sizes_shown = True
        sizes, summary.note = record_sizes(module, layers, example)

    # A shared parameter is counted under the first name that leads to it.
    first_names: dict[Tensor, str] = {}
    outside = LayerSummary(_NO_LAYER, "", 0)
    for name, parameter in module.named_parameters():
        first_names[parameter] = name
        count = _count(parameter)
        summary.bytes += count * parameter.dtype.itemsize
        if parameter.requires_grad:
            summary.trainable += count
        else:
            summary.frozen += count
        if "." not in name:
            outside.parameters += count
            outside.lazy |= isinstance(parameter, UninitializedParameter)
    for name, layer in layers.items():
        row = _summarize_layer(name, layer, first_names)
        row.in_size, row.out_size = sizes.get(name, (None, None))
        summary.layers.append(row)
    if layers and (outside.parameters or outside.lazy):
        summary.layers.append(outside)
    return summary


def _summarize_layer(
    name: str,
    layer: nn.Module,
    first_names: dict[Tensor, str],
) -> LayerSummary:
    row = LayerSummary(name, type(layer).__name__, 0, lazy=is_lazy(layer))
    row.mode = "train" if layer.training else "eval"
    for parameter in layer.parameters():
        if first_names[parameter].startswith(f"{name}."):
            row.parameters += _count(parameter)
        else:
            row.shared = True
    return row


def _count(parameter: Tensor) -> int:
    if isinstance(parameter, UninitializedParameter):
        return 0
    # DeepSpeed's ZeRO-3 leaves an empty tensor in its place and notes the true size beside it.
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def _readable(number: int) -> str:
    """1234 as "1.2 K", in at most five characters up to trillions."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            value = number / size
            return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.1f} {unit}"
    return str(number)
