"""Lightning's loops, of which Loopwright has only what can be read of them."""

from __future__ import annotations

from enum import Enum
from functools import partial

from ..imports import unserved

__all__ = [
    "AbstractClosure",
    "Closure",
    "ClosureResult",
    "Loop",
    "ManualResult",
    "OutputResult",
    "RestartStage",
    "_AutomaticOptimization",
    "_BatchProgress",
    "_DataFetcher",
    "_DataLoaderIterDataFetcher",
    "_EvaluationLoop",
    "_FitLoop",
    "_Loop",
    "_ManualOptimization",
    "_OptimizationProgress",
    "_OptimizerProgress",
    "_PredictionLoop",
    "_PrefetchDataFetcher",
    "_ProcessedTracker",
    "_Progress",
    "_ReadyCompletedTracker",
    "_SchedulerProgress",
    "_StartedTracker",
    "_TrainingEpochLoop",
]


class RestartStage(Enum):
    """Where in the loop a run goes on, in Lightning's checkpoints."""

    NONE = "none"
    RESTARTED_ON_EPOCH_START = "restarted_on_epoch_start"
    RESTARTED_MID_EPOCH = "restarted_mid_epoch"
    RESTARTED_ON_EPOCH_END = "restarted_on_epoch_end"
    RESUMED_ON_EPOCH_END = "resumed_on_epoch_end"
    RESTARTED_MID_EVALUATION = "restarted_mid_evaluation"


# What `optimizer_step` is given to run the step.
AbstractClosure = Closure = partial

_LOOPS = "the loop's counters are the Trainer's: current_epoch, global_step, batch_idx, max_epochs"
Loop = unserved("Loop", _LOOPS)
_Loop = unserved("_Loop", _LOOPS)
_AutomaticOptimization = unserved("_AutomaticOptimization", _LOOPS)
_ManualOptimization = unserved("_ManualOptimization", _LOOPS)
ClosureResult = unserved("ClosureResult", _LOOPS)
ManualResult = unserved("ManualResult", _LOOPS)
OutputResult = unserved("OutputResult", _LOOPS)
_BatchProgress = unserved("_BatchProgress", _LOOPS)
_OptimizationProgress = unserved("_OptimizationProgress", _LOOPS)
_OptimizerProgress = unserved("_OptimizerProgress", _LOOPS)
_ProcessedTracker = unserved("_ProcessedTracker", _LOOPS)
_Progress = unserved("_Progress", _LOOPS)
_ReadyCompletedTracker = unserved("_ReadyCompletedTracker", _LOOPS)
_SchedulerProgress = unserved("_SchedulerProgress", _LOOPS)
_StartedTracker = unserved("_StartedTracker", _LOOPS)
_FETCHERS = "a step is given a batch"
_DataFetcher = unserved("_DataFetcher", _FETCHERS)
_DataLoaderIterDataFetcher = unserved("_DataLoaderIterDataFetcher", _FETCHERS)
_PrefetchDataFetcher = unserved("_PrefetchDataFetcher", _FETCHERS)
_EvaluationLoop = unserved("_EvaluationLoop", _LOOPS)
_FitLoop = unserved("_FitLoop", _LOOPS)
_PredictionLoop = unserved("_PredictionLoop", _LOOPS)
_TrainingEpochLoop = unserved("_TrainingEpochLoop", _LOOPS)
