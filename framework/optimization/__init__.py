"""What ``configure_optimizers`` is made of: schedules of the learning rate, and groups of parameters."""
