"""Accelerate's names for DeepSpeed."""

from __future__ import annotations

from ...framework.compat.accelerate.big_models import (
    DeepSpeedEngineWrapper,
    DeepSpeedOptimizerWrapper,
    DeepSpeedSchedulerWrapper,
)
from ...framework.compat.accelerate.imports import names_of_others
from ...framework.compat.accelerate.plugins import (
    DummyOptim,
    DummyScheduler,
    HfDeepSpeedConfig,
)

__all__ = [
    "DeepSpeedEngineWrapper",
    "DeepSpeedOptimizerWrapper",
    "DeepSpeedSchedulerWrapper",
    "DummyOptim",
    "DummyScheduler",
    "HfDeepSpeedConfig",
]

__getattr__ = names_of_others(__name__)
