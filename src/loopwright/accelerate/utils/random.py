"""Accelerate's random numbers."""

from __future__ import annotations

from ...framework.compat.accelerate.imports import names_of_others
from ...framework.compat.accelerate.random import (
    set_seed,
    synchronize_rng_state,
    synchronize_rng_states,
)

__all__ = [
    "set_seed",
    "synchronize_rng_state",
    "synchronize_rng_states",
]

__getattr__ = names_of_others(__name__)
