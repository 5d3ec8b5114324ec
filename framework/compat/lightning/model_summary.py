"""Lightning's functions that count a model's parameters."""

from __future__ import annotations

from torch import nn

from ....callbacks.model_summary import LayerSummary, Summary, summarize

__all__ = [
    "LayerSummary",
    "ModelSummary",
    "get_human_readable_count",
    "summarize",
]


def ModelSummary(model: nn.Module, max_depth: int = 1) -> Summary:  # noqa: N802 # Lightning's name
    """Count a module's parameters; the result's ``str`` is a table.

    Args:
        model: the module.
        max_depth: how deep to go into nested layers; -1 for all.
    """
    return summarize(model, max_depth)


def get_human_readable_count(number: int) -> str:
    """A count in thousands (K), millions (M), billions (B) or trillions (T).

    Raises:
        ValueError: for a negative one.
    """
    if number < 0:
        raise ValueError(f"number must be 0 or more; got {number}")
    units = [" ", "K", "M", "B", "T"]
    size = float(number)
    while size >= 1000 and len(units) > 1:
        units.pop(0)
        size /= 1000
    shown = int(size) if units[0] == " " or size >= 100 else round(size, 1)
    return f"{shown:,} {units[0]}"
