"""Lightning's loggers."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from ....loggers import CSVLogger as NativeCSVLogger
from ....loggers import Logger
from ....loggers import TensorBoardLogger as NativeTensorBoardLogger
from ....loggers.dummy import DummyLogger, NullObject
from ..imports import unserved
from .files import yaml_of
from .utilities import rank_zero_only

__all__ = [
    "CSVLogger",
    "CometLogger",
    "DummyExperiment",
    "DummyLogger",
    "LitLogger",
    "Logger",
    "MLFlowLogger",
    "NeptuneLogger",
    "TensorBoardLogger",
    "WandbLogger",
    "_add_prefix",
    "_convert_params",
    "_flatten_dict",
    "_sanitize_callable_params",
    "rank_zero_experiment",
]

DummyExperiment = NullObject


class _HyperparametersInYAML:
    """Names and writes the file of hyperparameters as Lightning's programs read it."""

    NAME_HPARAMS_FILE = "hparams.yaml"

    def hparams_text(self, hparams: Any) -> str:
        """What the file holds."""
        return yaml_of(hparams)


class TensorBoardLogger(_HyperparametersInYAML, NativeTensorBoardLogger):
    """A :class:`~loopwright.loggers.TensorBoardLogger` in Lightning's folder, ``lightning_logs``."""

    def __init__(
        self,
        save_dir: Any,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            save_dir,
            name,
            version,
            log_graph,
            default_hp_metric,
            prefix,
            sub_dir,
            **kwargs,
        )


class CSVLogger(_HyperparametersInYAML, NativeCSVLogger):
    """A :class:`~loopwright.loggers.CSVLogger` in Lightning's folder, ``lightning_logs``."""

    def __init__(
        self,
        save_dir: Any,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)


def rank_zero_experiment(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a logger's ``experiment``: in all processes but the main one it takes everything and does nothing."""

    @functools.wraps(function)
    def experiment(self: Any) -> Any:
        if rank_zero_only.rank > 0:
            return NullObject()
        return function(self) or NullObject()

    return experiment


# What the loggers of packages call.


def _convert_params(params: dict[str, Any] | Namespace | None) -> dict[str, Any]:
    """Hyperparameters as a dict."""
    if isinstance(params, Namespace):
        return vars(params)
    return {} if params is None else dict(params)


def _flatten_dict(
    params: dict[Any, Any], delimiter: str = "/", parent_key: str = ""
) -> dict[str, Any]:
    """A dict of dicts as one dict, whose keys are joined."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        name = f"{parent_key}{delimiter}{key}" if parent_key else str(key)
        if isinstance(value, Namespace):
            value = vars(value)
        if isinstance(value, dict):
            flat.update(_flatten_dict(value, delimiter, name))
        else:
            flat[name] = value
    return flat


def _sanitize_callable_params(params: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters with functions and classes named."""
    return {
        name: getattr(value, "__name__", str(value)) if callable(value) else value
        for name, value in params.items()
    }


def _add_prefix(
    metrics: dict[str, float], prefix: str, separator: str
) -> dict[str, float]:
    """Metrics whose names begin with a prefix."""
    if not prefix:
        return metrics
    return {f"{prefix}{separator}{name}": value for name, value in metrics.items()}


_OTHERS = "use CSVLogger or TensorBoardLogger, or a Logger of your own; this one comes in a later version"
CometLogger = unserved("CometLogger", _OTHERS)
LitLogger = unserved("LitLogger", _OTHERS)
MLFlowLogger = unserved("MLFlowLogger", _OTHERS)
NeptuneLogger = unserved("NeptuneLogger", _OTHERS)
WandbLogger = unserved("WandbLogger", _OTHERS)
