"""Printing an evaluation's results."""

from __future__ import annotations
