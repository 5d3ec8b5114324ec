"""Lightning's small functions: ranks, nestings of tensors, memory, models, files."""

from ..framework.compat.lightning.utilities import *  # noqa: F403 # all that it lists

# So that the paths below it are imported, too.
__path__: list[str] = []
