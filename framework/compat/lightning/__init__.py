"""Lightning's names: for programs and packages that were written for Lightning 2.

``from loopwright.lightning import LightningModule, Trainer`` is for a program that may be edited. For one that may not,
call :func:`install` before it is imported, or run it by ``python -m loopwright.lightning PROGRAM``.
"""

from __future__ import annotations

import logging
import sys

from ...messages import configure
from ..imports import ImportedFaces, require_not_imported
from . import demos, loops, model_summary, plugins, profilers, tuner, types
from .callbacks import Callback
from .core import LightningDataModule, LightningModule
from .fabric import Fabric
from .files import open_objects_in_torch_load
from .inside import inside_of_lightning
from .paths import VERSION, WORDS, faces_of
from .seed import seed_everything
from .trainer import Trainer
from .utilities import disable_possible_user_warnings

__all__ = [
    "Callback",
    "Fabric",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "__version__",
    "demos",
    "disable_possible_user_warnings",
    "install",
    "loops",
    "model_summary",
    "plugins",
    "profilers",
    "seed_everything",
    "tuner",
    "types",
]

__version__ = VERSION

log = logging.getLogger("loopwright")

# `loopwright.lightning.callbacks.early_stopping`, and all other paths, beside what is a file there.
_OWN = ImportedFaces(
    faces_of(
        ("loopwright.lightning", "loopwright.lightning.pytorch"),
        ("loopwright.lightning.fabric",),
    ),
    WORDS,
    inside_of_lightning,
)
if not _OWN.is_installed():
    sys.meta_path.append(_OWN)

_PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric")
_LIGHTNINGS = ImportedFaces(
    faces_of(
        ("lightning", "lightning.pytorch", "pytorch_lightning"),
        ("lightning.fabric", "lightning_fabric"),
    ),
    WORDS,
    inside_of_lightning,
)


def install() -> None:
    """Answer imports of ``lightning``, ``pytorch_lightning`` and ``lightning_fabric`` in this process from now on.

    Call it before anything imports them. A script that starts several processes calls it again in each.

    Raises:
        RuntimeError: if the real Lightning has been imported already.
    """
    if _LIGHTNINGS.is_installed():
        return
    require_not_imported(_PACKAGES, "loopwright.lightning.install()")
    configure()
    # Before the finder of installed packages, as Lightning itself may be installed.
    sys.meta_path.insert(0, _LIGHTNINGS)
    open_objects_in_torch_load()
    # Lightning sets it, and programs that collect its lines rely on that.
    lightning_log = logging.getLogger("lightning.pytorch")
    if lightning_log.level == logging.NOTSET:
        lightning_log.setLevel(logging.INFO)
    log.info(
        "Imports of %s are answered by Loopwright in this process", ", ".join(_PACKAGES)
    )
