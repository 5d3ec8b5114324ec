"""Parts inside of Lightning, which programs import for checks of types and for their own tests; nothing serves them."""

from __future__ import annotations

import signal

from ..imports import unserved

__all__ = [
    "_METRICS",
    "_OUT_DICT",
    "_CallbackConnector",
    "_CheckpointConnector",
    "_ChildProcessObserver",
    "_DataConnector",
    "_DataHookSelector",
    "_DataLoaderSource",
    "_FxValidator",
    "_Launcher",
    "_LoggerConnector",
    "_Metadata",
    "_MultiProcessingLauncher",
    "_ResultCollection",
    "_ResultMetric",
    "_SignalConnector",
    "_SubprocessScriptLauncher",
    "_Sync",
    "_WorkerOutput",
    "_XLALauncher",
]

_CONNECTORS = "the Trainer does its work; its attributes say what there is"
_CallbackConnector = unserved("_CallbackConnector", _CONNECTORS)
_CheckpointConnector = unserved("_CheckpointConnector", _CONNECTORS)
_DataConnector = unserved("_DataConnector", _CONNECTORS)
_DataHookSelector = unserved("_DataHookSelector", _CONNECTORS)
_DataLoaderSource = unserved("_DataLoaderSource", _CONNECTORS)
_FxValidator = unserved("_FxValidator", _CONNECTORS)
_LoggerConnector = unserved("_LoggerConnector", _CONNECTORS)


class _SignalConnector(unserved("_SignalConnector", _CONNECTORS)):
    """Answers for the signals that a process may get, which tests set back."""

    @staticmethod
    def _valid_signals() -> set[signal.Signals]:
        return signal.valid_signals()


_VALUES = "what was logged is in trainer.callback_metrics and logged_metrics"
_Metadata = unserved("_Metadata", _VALUES)
_ResultCollection = unserved("_ResultCollection", _VALUES)
_ResultMetric = unserved("_ResultMetric", _VALUES)
_Sync = unserved("_Sync", _VALUES)
_METRICS = dict
_OUT_DICT = dict

_PROCESSES = (
    "the Trainer starts processes by itself, and works under torchrun and SLURM"
)
_ChildProcessObserver = unserved("_ChildProcessObserver", _PROCESSES)
_Launcher = unserved("_Launcher", _PROCESSES)
_MultiProcessingLauncher = unserved("_MultiProcessingLauncher", _PROCESSES)
_SubprocessScriptLauncher = unserved("_SubprocessScriptLauncher", _PROCESSES)
_WorkerOutput = unserved("_WorkerOutput", _PROCESSES)
_XLALauncher = unserved("_XLALauncher", "there is no support for TPUs")
