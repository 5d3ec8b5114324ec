"""What the programs of this folder share: seeds, and the lines by which they report."""

from __future__ import annotations

import json
import logging
import random
import warnings
from typing import Any

import numpy
import torch

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
torch.set_num_threads(1)

# The Trainer's arguments that keep it quiet.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def seed() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def report(part: str, *values: Any, drawn: bool = False) -> None:
    """Report the results of a part; `drawn` if random numbers of the trainer decide them."""
    lists = [
        numpy.asarray(_array(value), dtype=float).ravel().tolist() for value in values
    ]
    print("RESULT " + json.dumps([part, lists, drawn]), flush=True)


def _array(value: Any) -> Any:
    return value.detach() if hasattr(value, "detach") else value
