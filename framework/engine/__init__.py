"""How a step is computed, on one device or many: the Engine and its parts."""
