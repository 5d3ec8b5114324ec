"""``loopwright submit``: files that start a program on a cluster."""
