"""Lightning's tuner, which is not there yet."""

from ..framework.compat.lightning.tuner import *  # noqa: F403 # all that it lists

# So that the paths below it are imported, too.
__path__: list[str] = []
