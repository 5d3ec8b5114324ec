"""How a run has ended, and why."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

from ...callbacks import Timer
from ...strategies.launch.failures import report_of

if TYPE_CHECKING:
    from ..loop.run import Run


def ending(run: Run, error: BaseException | None) -> dict[str, Any]:
    """Describe the end of a run.

    Args:
        run: the run.
        error: what has ended it, if it did not come to its end.
    """
    state = run.state
    ended: dict[str, Any] = {
        "when": time.time(),
        "step": state.global_step,
        "epoch": state.epoch,
        "exit_code": 0,
        "failure": None,
    }
    if run.consensus.signal:
        name = signal.Signals(run.consensus.signal).name
        code = 128 + run.consensus.signal
        return {"how": "signal", "why": name, **ended, "exit_code": code}
    if isinstance(error, KeyboardInterrupt):
        return {"how": "signal", "why": "SIGINT", **ended, "exit_code": 130}
    if error is not None:
        report = report_of(error)
        ended |= {
            "exit_code": report.exit_code,
            "failure": os.path.join("..", "failure.json"),
        }
        return {
            "how": "failed",
            "why": report.line(run.trainer.world_size),
            **ended,
            "traceback": report.trace[-8000:],
        }
    how, why = _reason(run)
    return {"how": how, "why": why, **ended}


def _reason(run: Run) -> tuple[str, str]:
    """Why a run came to its end without an error."""
    trainer = run.trainer
    state = run.state
    if run.fn != "fit":
        return "finished", f"{run.fn} came to its end"
    for callback in trainer.early_stopping_callbacks:
        if callback.stopping_reason_message:
            return "stopped", callback.stopping_reason_message
    if trainer.max_steps != -1 and state.global_step >= trainer.max_steps:
        return "finished", f"max_steps={trainer.max_steps}"
    max_epochs = trainer.max_epochs
    if max_epochs not in (None, -1) and state.epoch >= max_epochs:
        return "finished", f"max_epochs={max_epochs}"
    if any(isinstance(callback, Timer) for callback in trainer.callbacks):
        return "stopped", f"max_time={trainer.max_time}"
    return "stopped", "trainer.should_stop was set"
