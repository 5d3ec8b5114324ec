"""Accelerate's names for what its launcher does, which is loopwright's own here."""

from __future__ import annotations

from ...framework.compat.accelerate.imports import names_of_others

__all__: list[str] = []

__getattr__ = names_of_others(__name__)
