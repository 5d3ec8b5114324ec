"""Those of Accelerate's commands that have a counterpart here."""

from __future__ import annotations

__all__: list[str] = []
