"""Lightning's strategies."""

from ..framework.compat.lightning.strategies import *  # noqa: F403 # all that it lists

# So that the paths below it are imported, too.
__path__: list[str] = []
