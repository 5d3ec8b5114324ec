"""Where batches come from, and how far a run has read them."""
