"""Lightning's command line, on Loopwright's."""

from ..framework.compat.imports import import_parts_of
from ..framework.compat.lightning.cli import *  # noqa: F403 # all that it lists

# So that the paths below it are imported, too, and when they are asked for.
__path__: list[str] = []
__getattr__ = import_parts_of(__name__)
