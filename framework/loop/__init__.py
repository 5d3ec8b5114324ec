"""What a run does: epochs, batches, steps, hooks, evaluation."""
