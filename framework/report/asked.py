"""What ``loopwright replay`` and ``loopwright batch`` ask of a program that they run again."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

# The environment variable that holds it. A program can see by it that it is run again.
VARIABLE = "LOOPWRIGHT_REPLAY"


@dataclass(frozen=True)
class Asked:
    """What a process that is run again is to do.

    Attributes:
        record: the record's folder of the run that is repeated.
        fit: which fit of the program it was, from 1.
        world_size: number of its ranks.
        rank: the rank to show.
        step: the step to show: the one with which ``global_step`` becomes this.
        checkpoint: the checkpoint to begin with; None for the beginning.
        begin: the step at which that is.
        scratch: a folder for what has to be written somewhere; it is removed afterwards.
        output: the file descriptor of the terminal, where standard output is hidden until the step has come; -1 if it
            is not.
        shows_batch: print the samples of the step, and train nothing.
        debugger: open pdb before the step.
        detect_anomaly: raise at the first loss or gradient that is not finite.
        trace: a file for what the modules have computed in the step; empty for none.
    """

    record: str
    fit: int
    world_size: int
    rank: int
    step: int
    checkpoint: str | None
    begin: int
    scratch: str
    output: int = -1
    shows_batch: bool = False
    debugger: bool = False
    detect_anomaly: bool = False
    trace: str = ""

    @property
    def begun(self) -> str:
        """A file that the rank to show makes when the fit begins."""
        return os.path.join(self.scratch, "begun")

    def variables(self) -> dict[str, str]:
        """Return what a process finds it by, in its environment."""
        return {VARIABLE: json.dumps(asdict(self))}


def asked() -> Asked | None:
    """Return what is asked of this process; None of most."""
    text = os.environ.get(VARIABLE)
    return None if text is None else Asked(**json.loads(text))


def own_rank() -> int:
    """Return which rank this process is, before anything is set up; the commands set the variable."""
    return int(os.environ.get("RANK", 0))
