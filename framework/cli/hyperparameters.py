"""The hyperparameters of a model in a checkpoint that a command line has made."""

from __future__ import annotations

import os
from typing import Any

from ..checkpoint.class_paths import INSTANTIATOR
from ..checkpoint.reader import load_checkpoint
from ..errors import CheckpointError


def read_hyperparameters(path: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Read what a command line had been told of the model that a checkpoint holds.

    Args:
        path: of the checkpoint; or another value of ``ckpt_path``, such as ``"last"``.

    Returns:
        Arguments by name; none where the path is no checkpoint's, or its model was made in another way.
    """
    if path is None or not os.path.exists(path):
        return {}
    try:
        hparams = load_checkpoint(os.fspath(path)).get("hyper_parameters", {})
    except CheckpointError:
        # The run says what is wrong with it.
        return {}
    if INSTANTIATOR not in hparams:
        return {}
    return {name: value for name, value in hparams.items() if name != INSTANTIATOR}
