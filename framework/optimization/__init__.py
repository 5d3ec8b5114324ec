"""What ``configure_optimizers`` is made of: schedules of the learning rate, groups of parameters, and the Tuner."""
