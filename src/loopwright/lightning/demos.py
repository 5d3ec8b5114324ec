"""Lightning's small models for trying things out."""

from ..framework.compat.lightning.demos import *  # noqa: F403 # all that it lists

# So that the paths below it are imported, too.
__path__: list[str] = []
