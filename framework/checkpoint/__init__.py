"""What is on disk: checkpoints as folders of tensors and JSON."""
