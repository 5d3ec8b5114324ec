"""Lightning's tuner, which is not there yet."""

from __future__ import annotations

from ..imports import unserved

__all__ = ["Tuner"]

Tuner = unserved(
    "Tuner",
    'it comes in a later version; Trainer(micro_batch="auto") divides a batch that does not fit',
)
