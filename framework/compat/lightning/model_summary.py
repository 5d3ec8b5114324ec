"""Lightning's functions that count a model's parameters."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.flop_counter import FlopCounterMode

from ....callbacks.layer_sizes import record_sizes
from ..imports import unserved
from .utilities import rank_zero_warn

__all__ = [
    "LEFTOVER_PARAMS_NAME",
    "NOT_APPLICABLE",
    "PARAMETER_NUM_UNITS",
    "UNKNOWN_SIZE",
    "DeepSpeedSummary",
    "LayerSummary",
    "ModelSummary",
    "get_formatted_model_size",
    "get_human_readable_count",
    "parse_batch_shape",
    "summarize",
]

PARAMETER_NUM_UNITS = [" ", "K", "M", "B", "T"]
UNKNOWN_SIZE = "?"
LEFTOVER_PARAMS_NAME = "other params"
NOT_APPLICABLE = "n/a"

DeepSpeedSummary = unserved(
    "DeepSpeedSummary", "a ModelSummary counts the parameters of all processes"
)


class LayerSummary:
    """What is known of a layer.

    Args:
        module: the layer.

    Attributes:
        in_size: the shape of what it took, as a list; of several, a list of those; ``"?"`` if that is not known.
        out_size: the shape of what it returned.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.in_size: Any = UNKNOWN_SIZE
        self.out_size: Any = UNKNOWN_SIZE

    @property
    def layer_type(self) -> str:
        """The name of its class."""
        return type(self._module).__name__

    @property
    def num_parameters(self) -> int:
        """How many numbers are in its parameters."""
        return _count(self._module)

    @property
    def training(self) -> bool:
        """Whether it is in training mode."""
        return self._module.training


class ModelSummary:
    """Counts a module's parameters; its ``str`` is a table.

    Where the module has an ``example_input_array``, it is called once, for the sizes that its layers take and return,
    and for the operations that they need.

    Args:
        model: the module.
        max_depth: how deep to go into nested layers; -1 for all, 0 for the totals only.

    Raises:
        ValueError: for another depth.
    """

    def __init__(self, model: nn.Module, max_depth: int = 1) -> None:
        if not isinstance(max_depth, int) or max_depth < -1:
            raise ValueError(f"`max_depth` can be -1, 0 or > 0, got {max_depth}.")
        self._model = model
        self._max_depth = max_depth
        self._flops: Any = None
        self._layer_summary = self.summarize()

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """The layers down to the depth, with their names."""
        depth = self._max_depth
        return [
            (name, module)
            for name, module in self._model.named_modules()
            if name and (depth == -1 or name.count(".") < depth)
        ]

    def summarize(self) -> dict[str, LayerSummary]:
        """Look at the layers again; returns what is known of each, by name."""
        layers = dict(self.named_modules)
        summary = {name: LayerSummary(layer) for name, layer in layers.items()}
        example = getattr(self._model, "example_input_array", None)
        if example is not None:
            # TorchScript cannot be counted.
            is_scripted = any(_is_scripted(part) for part in self._model.modules())
            counting = FlopCounterMode(display=False)
            with nullcontext() if is_scripted else counting:
                sizes, _ = record_sizes(self._model, layers, example)
            self._flops = None if is_scripted else counting
            for name, (in_size, out_size) in sizes.items():
                summary[name].in_size = _size(in_size)
                summary[name].out_size = _size(out_size)
        self._layer_summary = summary
        return summary

    def _rows(self) -> list[LayerSummary]:
        return list(self._layer_summary.values())

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers."""
        return list(self._layer_summary)

    @property
    def layer_types(self) -> list[str]:
        """Names of their classes."""
        return [layer.layer_type for layer in self._rows()]

    @property
    def in_sizes(self) -> list[Any]:
        """Sizes of what they take."""
        return [layer.in_size for layer in self._rows()]

    @property
    def out_sizes(self) -> list[Any]:
        """Sizes of what they return."""
        return [layer.out_size for layer in self._rows()]

    @property
    def param_nums(self) -> list[int]:
        """How many numbers are in their parameters."""
        return [layer.num_parameters for layer in self._rows()]

    @property
    def training_modes(self) -> list[bool]:
        """Whether they are in training mode."""
        return [layer.training for layer in self._rows()]

    @property
    def total_training_modes(self) -> dict[str, int]:
        """How many parts of the module are in each mode, at any depth."""
        modes = [module.training for module in list(self._model.modules())[1:]]
        return {"train": modes.count(True), "eval": modes.count(False)}

    @property
    def total_parameters(self) -> int:
        """How many numbers are in all parameters, shared ones counted once."""
        return _count(self._model, warns=True)

    @property
    def trainable_parameters(self) -> int:
        """How many are in those that are trained."""
        return _count(self._model, warns=True, trained_only=True)

    @property
    def total_layer_params(self) -> int:
        """How many are in the layers, of which each is counted once."""
        seen = {p for layer in self._model.children() for p in layer.parameters()}
        return sum(_numel(parameter) for parameter in seen)

    @property
    def model_size(self) -> float:
        """The memory of the parameters, in megabytes (10⁶ bytes)."""
        parameters = self._model.parameters()
        return sum(_numel(p) * p.dtype.itemsize for p in parameters) / 1e6

    @property
    def flop_counts(self) -> dict[str, dict[Any, int]]:
        """Operations of each layer in a forward pass, by name and kind; none without an ``example_input_array``."""
        counts = {} if self._flops is None else self._flops.get_flop_counts()
        root = type(self._model).__name__
        return {
            name: dict(counts.get(f"{root}.{name}", {})) for name in self.layer_names
        }

    @property
    def total_flops(self) -> int:
        """Operations of a forward pass."""
        return 0 if self._flops is None else self._flops.get_total_flops()

    def _get_summary_data(self) -> list[tuple[str, list[str]]]:
        """The columns of the table: headings and cells."""
        rows = self._rows()
        flops = [sum(counts.values()) for counts in self.flop_counts.values()]
        columns = {
            " ": [str(number) for number in range(len(rows))],
            "Name": self.layer_names,
            "Type": self.layer_types,
            "Params": [get_human_readable_count(n) for n in self.param_nums],
            "Mode": ["train" if mode else "eval" for mode in self.training_modes],
            "FLOPs": [get_human_readable_count(n) for n in flops],
        }
        if getattr(self._model, "example_input_array", None) is not None:
            columns["In sizes"] = [str(size) for size in self.in_sizes]
            columns["Out sizes"] = [str(size) for size in self.out_sizes]
        outside = _count(self._model) - self.total_layer_params
        if rows and outside:
            for heading, cells in columns.items():
                cells.append(NOT_APPLICABLE if heading != " " else " ")
            columns["Name"][-1] = LEFTOVER_PARAMS_NAME
            columns["Params"][-1] = get_human_readable_count(outside)
        return list(columns.items())

    def __str__(self) -> str:
        data = self._get_summary_data()
        table = [[heading, *cells] for heading, cells in data]
        widths = [max(map(len, column)) for column in table]
        lines = []
        for row in zip(*table, strict=True):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append(" | ".join(cells))
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:], rule, *self._totals()])

    __repr__ = __str__

    def _totals(self) -> list[str]:
        total = self.total_parameters
        trained = self.trainable_parameters
        modes = self.total_training_modes
        values = {
            "Trainable params": get_human_readable_count(trained),
            "Non-trainable params": get_human_readable_count(total - trained),
            "Total params": get_human_readable_count(total),
            "Total estimated model params size (MB)": f"{self.model_size:,.3f}",
            "Modules in train mode": str(modes["train"]),
            "Modules in eval mode": str(modes["eval"]),
            "Total Flops": get_human_readable_count(self.total_flops),
        }
        return [f"{value:<10}{title}" for title, value in values.items()]


def summarize(lightning_module: nn.Module, max_depth: int = 1) -> ModelSummary:
    """Count a module's parameters; arguments as of :class:`ModelSummary`."""
    return ModelSummary(lightning_module, max_depth)


def _is_scripted(module: nn.Module) -> bool:
    from torch.jit import ScriptModule

    return isinstance(module, ScriptModule)


def _numel(parameter: Any) -> int:
    return 0 if isinstance(parameter, UninitializedParameter) else parameter.numel()


def _count(module: nn.Module, warns: bool = False, trained_only: bool = False) -> int:
    """How many numbers are in a module's parameters."""
    parameters = list(module.parameters())
    if warns and any(isinstance(p, UninitializedParameter) for p in parameters):
        rank_zero_warn(
            "The total number of parameters detected may be inaccurate. Some get their shape with the first batch"
        )
    return sum(_numel(p) for p in parameters if p.requires_grad or not trained_only)


def _size(size: Any) -> Any:
    """A shape, or a nesting of shapes, as lists."""
    if size is None:
        return UNKNOWN_SIZE
    if isinstance(size, (list, tuple)):
        parts = [_size(part) for part in size]
        return parts if parts else UNKNOWN_SIZE
    return size


def parse_batch_shape(batch: Any) -> Any:
    """The shape of a batch as a list; of a list, tuple or dict, of each part; ``"?"`` where it has none."""
    if getattr(batch, "shape", ()):
        return list(batch.shape)
    if isinstance(batch, dict):
        batch = list(batch.values())
        return parse_batch_shape(batch[0] if len(batch) == 1 else batch)
    if isinstance(batch, (list, tuple)) and batch:
        return [parse_batch_shape(part) for part in batch]
    return UNKNOWN_SIZE


def get_formatted_model_size(total_model_size: float) -> str:
    """A size in megabytes as text."""
    return f"{total_model_size:,.3f}"


def get_human_readable_count(number: int) -> str:
    """A count in thousands (K), millions (M), billions (B) or trillions (T).

    Raises:
        ValueError: for a negative one.
    """
    if number < 0:
        raise ValueError(f"number must be 0 or more; got {number}")
    units = [*PARAMETER_NUM_UNITS]
    size = float(number)
    while size >= 1000 and len(units) > 1:
        units.pop(0)
        size /= 1000
    shown = math.floor(size) if units[0] == " " or size >= 100 else round(size, 1)
    return f"{shown:,} {units[0]}"
