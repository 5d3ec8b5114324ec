"""The module of Lightning's own environment of processes, with what stands beside it."""

from __future__ import annotations

from .cluster import LightningEnvironment
from .utilities import find_free_network_port

__all__ = ["LightningEnvironment", "find_free_network_port"]
