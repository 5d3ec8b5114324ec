"""Accelerate's trackers."""

from __future__ import annotations

from ..framework.compat.accelerate.big_models import (
    AimTracker,
    ClearMLTracker,
    DVCLiveTracker,
    SwanLabTracker,
)
from ..framework.compat.accelerate.imports import names_of_others
from ..framework.compat.accelerate.tracking import (
    LOGGER_TYPE_TO_CLASS,
    CometMLTracker,
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
    filter_trackers,
    get_available_trackers,
    on_main_process,
    register_tracker_class,
)

__all__ = [
    "LOGGER_TYPE_TO_CLASS",
    "AimTracker",
    "ClearMLTracker",
    "CometMLTracker",
    "DVCLiveTracker",
    "GeneralTracker",
    "MLflowTracker",
    "SwanLabTracker",
    "TensorBoardTracker",
    "TrackioTracker",
    "WandBTracker",
    "filter_trackers",
    "get_available_trackers",
    "on_main_process",
    "register_tracker_class",
]

__getattr__ = names_of_others(__name__)
