"""Accelerate's names."""
