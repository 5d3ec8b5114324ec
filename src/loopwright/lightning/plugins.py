"""Lightning's plugins: precisions, the environments of launchers, and what writes checkpoints."""

from ..framework.compat.lightning.plugins import *  # noqa: F403 # all that it lists

# So that the paths below it are imported, too.
__path__: list[str] = []
