"""The command `loopwright`."""
