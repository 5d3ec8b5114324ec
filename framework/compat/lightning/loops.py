"""Lightning's loops, of which Loopwright has only what can be read of them."""

from __future__ import annotations

from ..imports import unserved

__all__ = [
    "Loop",
    "_EvaluationLoop",
    "_FitLoop",
    "_PredictionLoop",
    "_TrainingEpochLoop",
]

_LOOPS = "the loop's counters are the Trainer's: current_epoch, global_step, batch_idx, max_epochs"
Loop = unserved("Loop", _LOOPS)
_EvaluationLoop = unserved("_EvaluationLoop", _LOOPS)
_FitLoop = unserved("_FitLoop", _LOOPS)
_PredictionLoop = unserved("_PredictionLoop", _LOOPS)
_TrainingEpochLoop = unserved("_TrainingEpochLoop", _LOOPS)
