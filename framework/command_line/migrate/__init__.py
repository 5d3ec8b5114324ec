"""Programs that were written for Lightning or Accelerate, rewritten for Loopwright."""
