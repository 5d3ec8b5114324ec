"""Lightning's profilers: as the Trainer's ``profiler``, they are callbacks here."""

from ..framework.compat.lightning.profilers import *  # noqa: F403 # all that it lists

# So that the paths below it are imported, too.
__path__: list[str] = []
