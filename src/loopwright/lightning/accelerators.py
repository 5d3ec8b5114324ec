"""Lightning's accelerators: names for kinds of devices."""

from ..framework.compat.lightning.accelerators import *  # noqa: F403 # all that it lists

# So that the paths below it are imported, too.
__path__: list[str] = []
