"""How much memory a training takes, before any of it is taken."""

from .plan import Estimate, Plan

__all__ = ["Estimate", "Plan"]
