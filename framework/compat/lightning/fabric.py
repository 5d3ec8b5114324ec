"""Lightning Fabric's names."""

from __future__ import annotations

from ..imports import unserved
from .seed import isolate_rng, seed_everything

__all__ = ["Fabric", "isolate_rng", "seed_everything"]

Fabric = unserved(
    "Fabric",
    "loopwright.Engine is what it is: engine.prepare(model, optimizer, loader) for setup and setup_dataloaders, "
    "engine.backward, engine.save_state and load_state",
)
